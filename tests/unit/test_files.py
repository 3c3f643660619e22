"""Files that a user names: regular ones only, bounded, and every other one is refused in one line without waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise.errors import ClusterError
from shardwise.files import check_regular, read_regular, read_regular_text

Reader = Callable[[Path], object]

READERS: list[Reader] = [
    lambda path: read_regular(path, 100, ClusterError, "cluster file"),
    lambda path: check_regular(path, ClusterError, "cluster file", 100),
]


def refusal(read: Reader, path: Path) -> str:
    with pytest.raises(ClusterError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "cluster file" in message
    return message


@pytest.mark.parametrize("read", READERS, ids=["read", "check"])
class TestEveryReader:
    def test_refuses_what_is_no_regular_file(self, read: Reader, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            assert "is a socket" in refusal(read, tmp_path / "socket")
        assert "is a pipe" in refusal(read, tmp_path / "pipe")
        assert "is a folder" in refusal(read, tmp_path)
        assert "is a device" in refusal(read, Path("/dev/zero"))

    def test_follows_links_to_what_they_are(self, read: Reader, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/dev/zero")
        assert "is a device" in refusal(read, tmp_path / "link")

    def test_refuses_a_file_that_is_not_there(self, read: Reader, tmp_path: Path) -> None:
        assert "there is no such file" in refusal(read, tmp_path / "none")
        assert "cannot be read" in refusal(read, tmp_path / "nul\0in it")

    def test_refuses_a_file_that_is_too_large(self, read: Reader, tmp_path: Path) -> None:
        with (tmp_path / "large").open("wb") as file:
            file.truncate(1 << 40)  # a sparse file
        assert "larger than 100 B" in refusal(read, tmp_path / "large")


def test_reads_a_file_that_is_just_small_enough(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_regular(tmp_path / "file", 100) == b"x" * 100
    assert check_regular(tmp_path / "file") == 100


def test_bounds_a_file_that_has_more_than_it_states() -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc")
    assert os.stat("/proc/self/smaps").st_size == 0
    assert "larger than" in refusal(
        lambda path: read_regular(path, 100, ClusterError, "cluster file"), Path("/proc/self/smaps")
    )


def test_says_which_byte_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc\xff")
    assert "byte 3" in refusal(
        lambda path: read_regular_text(path, 100, ClusterError, "cluster file"), tmp_path / "file"
    )
