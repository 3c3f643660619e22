"""Files `metrics.jsonl` and `ranks.jsonl` of a run: a JSON object per step; they are repaired when a run is resumed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from shardwise.errors import RunFolderError
from shardwise.files import check_regular
from shardwise.run.jsonfile import parse_json, sync_folder
from shardwise.run.training.run_folder import told_writing

_LONGEST_LINE = 1 << 20
"""Largest number of bytes in a line; a longer line is damaged."""

logger = logging.getLogger(__name__)


class MetricsFile:
    """Metrics file, open for appending; lines of an earlier run after the step at which this one resumes are removed.

    Damaged lines are removed too. The damaged file is then kept under another name, and a warning names it.

    Args:
        path: path of the file, which may exist.
        done: number of steps before this run.

    Raises:
        RunFolderError: `path` is not a regular file.
        ShardwiseError: the file cannot be written.
    """

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        self._evaluated: set[str] = set()
        with told_writing(path):
            if os.path.lexists(path):
                check_regular(path, RunFolderError, "metrics file")
                self._mend(done)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        self._done = done

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. The evaluation of the step at which the run resumes is skipped if the file already has it.

        Raises:
            ShardwiseError: the line cannot be written, for example because the disk is full.
        """
        if (
            record["step"] == self._done
            and self._evaluated
            and self._evaluated.issuperset(record.get("evaluation", " "))
        ):
            return
        line = memoryview((json.dumps(record) + "\n").encode())
        with told_writing(self.path):
            while line:
                line = line[self._file.write(line) :]  # a nearly full disk may take only a part of the line

    def sync(self) -> None:
        """Wait until all lines are on disk. Raises ShardwiseError."""
        with told_writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file after all lines are on disk. Raises ShardwiseError."""
        try:
            self.sync()
        finally:
            self._file.close()

    def _mend(self, done: int) -> None:
        """Rewrite the file with only its undamaged lines up to step `done`."""
        partial, aside = self.path.with_name(f".{self.path.name}.partial"), self.path.with_suffix(".damaged")
        partial.unlink(missing_ok=True)
        damaged = 0
        with partial.open("xb") as new:
            for line, record in _records(self.path):
                if record is None:
                    damaged += 1
                elif record["step"] <= done:
                    new.write(line)
                    if record["step"] == done and isinstance(record.get("evaluation"), dict):
                        self._evaluated |= record["evaluation"].keys()
            new.flush()
            os.fsync(new.fileno())
        if damaged:
            self.path.replace(aside)
            logger.warning("%s: %d damaged lines are left out; the file as it was is %s", self.path, damaged, aside)
        partial.replace(self.path)
        sync_folder(self.path.parent)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield every line with its record, which is None if the line is damaged; an incomplete last line is skipped."""
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            if line.endswith(b"\n") or len(line) == _LONGEST_LINE:
                yield line, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
