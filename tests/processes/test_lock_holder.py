"""A run folder that another process holds, and one whose holder has forked or was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.errors import RunFolderError
from shardwise.run.training.lock import release_lock, take_lock

HOLDER = """
import sys
from pathlib import Path
from shardwise.run.training.lock import take_lock
take_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def free(tmp_path: Path) -> Iterator[None]:
    yield
    release_lock(tmp_path)


def holder(folder: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_is_told_who_has_it_and_a_killed_holder_leaves_nothing_behind(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(RunFolderError, match=rf"is in use: process {process.pid} trains in it; wait until .* --out"):
        take_lock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    take_lock(tmp_path)


def test_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    take_lock(tmp_path)
    heard, said = os.pipe()
    ready, there = os.pipe()
    child = os.fork()
    if child == 0:  # as workers of a data loader are, who may outlive their parent
        os.close(said)
        os.write(there, b"x")
        os.read(heard, 1)
        os._exit(0)
    os.close(heard)
    try:
        os.read(ready, 1)
        release_lock(tmp_path)
        take_lock(tmp_path)
    finally:
        os.close(said)
        os.waitpid(child, 0)
