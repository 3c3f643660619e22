from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from full_disk import full_disk  # noqa: F401 - a fixture

from shardwise.errors import WorkerFailed
from shardwise.launch.signals import Terminated
from shardwise.run.training.messages import MESSAGES, add_message, end_noted, warnings_noted


def messages(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MESSAGES).read_text().splitlines()]


@pytest.mark.parametrize(
    ("error", "how", "text"),
    [
        (None, "finished", ""),
        (Terminated(143), "stopped", ""),
        (KeyboardInterrupt(), "interrupted", ""),
        (WorkerFailed("worker 1 died", rank=1), "failed", "worker 1 died"),
        (ValueError("two\nlines"), "failed", "two lines"),
        (MemoryError(), "failed", "MemoryError"),
    ],
)
def test_end_is_noted(tmp_path: Path, error: BaseException | None, how: str, text: str) -> None:
    def run() -> None:
        with end_noted(tmp_path):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    (message,) = messages(tmp_path)
    assert (message["kind"], message["how"], message["text"]) == ("end", how, text)


def test_end_of_other_ranks_is_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with end_noted(tmp_path):
            assert not (tmp_path / MESSAGES).exists()
    assert len(messages(tmp_path)) == 1


def test_warnings_are_noted_and_printed_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger, root = logging.getLogger("shardwise.run.some"), logging.getLogger()
    others, root.handlers = root.handlers, []  # those of pytest
    try:
        with warnings_noted(tmp_path):
            logger.warning("the %s is slow", "disk")
            logger.info("nobody cares")
        logger.warning("after it")
    finally:
        root.handlers = others
    assert [message["text"] for message in messages(tmp_path)] == ["the disk is slow"]
    assert capsys.readouterr().err == "the disk is slow\nafter it\n"


def test_warnings_are_printed_once_where_logging_is_set_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings_noted(tmp_path), caplog.at_level(logging.WARNING):
        logging.getLogger("shardwise").warning("once")
    assert [record.getMessage() for record in caplog.records] == ["once"]
    with warnings_noted(None):
        pass


def test_message_that_cannot_be_written_ends_nothing(full_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    for _ in range(1000):
        add_message(full_disk, "note", text="x" * 1000)
    add_message(tmp_path / "gone", "note")
    (tmp_path / MESSAGES).symlink_to(tmp_path / "mine")
    add_message(tmp_path, "note")
    assert not (tmp_path / "mine").exists()
