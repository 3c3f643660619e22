"""Reads a table of runs: rows that can be predicted, and those that cannot, with the reason."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import DataError
from shardwise.predict.published.lacking import Lacking
from shardwise.predict.published.row import Run, read

NEEDED = ("hidden", "heads", "layers", "seq_len", "gpu", "n_gpus", "global_batch", "micro_batch", "precision")
"""Columns without which no row can be predicted."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is not predicted.

    Attributes:
        line: of the file, the header being line 1.
        group: of the table.
        reason: what it lacks.
    """

    line: int
    group: str
    reason: str


def read_runs(path: Path | str) -> tuple[list[Run], list[Skipped]]:
    """All runs of a CSV with a header, and the rows that are skipped.

    Raises:
        DataError: the file cannot be read, or has not the columns of a table of runs.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in NEEDED if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path}: has no column {', '.join(missing)}; a table of runs needs {', '.join(NEEDED)}"
                )
            return _understood((reader.line_num, {k: v or "" for k, v in row.items() if k}) for row in reader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is not a CSV in UTF-8: {error}") from None


def _understood(rows: Iterable[tuple[int, Mapping[str, str]]]) -> tuple[list[Run], list[Skipped]]:
    runs, skipped = [], []
    for line, row in rows:
        try:
            runs.append(read(row, line))
        except Lacking as reason:
            skipped.append(Skipped(line, row.get("group", ""), str(reason)))
    return runs, skipped
