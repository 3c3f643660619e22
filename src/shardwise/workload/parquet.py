"""Datasets of Parquet files, as Spark and others write them: rows are samples.

A row is read by its index, out of a row group that is decoded once and cached while it is in use. Each replica reads
the rows of its own share of a batch alone, so that over all replicas no row is read twice in an epoch.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import DataError
from shardwise.workload.recipes.packages import require

CACHED_GROUPS = 8
"""Row groups that a dataset caches: rows in random order come from several at a time."""

Row = dict[str, Tensor]


class ParquetRows(Dataset[Row]):
    """Rows of the Parquet files in a folder: each is a dict of tensors by column.

        Workload(dataset=ParquetRows("data", ["features", "label"]), inputs=lambda batch: batch["features"], ...)

    Numbers become tensors without dimensions; lists of numbers, which are equally long in all rows, become vectors.
    The order of the rows is that of the files' names; files and folders whose names begin with `_` or `.` are left out,
    as Spark does.

    Args:
        folder: folder with `*.parquet` files, in it or below it; or one such file.
        columns: columns to read; None: all.

    Raises:
        DataError: there is no such file, one cannot be read, the files differ in their columns, or a column is missing
            or holds something else than numbers. Also while rows are read: lists of a column that are not equally long.
        WorkloadError: pyarrow is not installed.
    """

    def __init__(self, folder: str | Path, columns: Sequence[str] | None = None) -> None:
        if isinstance(columns, str):
            raise DataError(f"columns={columns!r}: must be a list of names, [{columns!r}]")
        self.paths = _files(Path(folder).resolve())
        self._groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        types: dict[str, Any] = {}
        for number, path in enumerate(self.paths):
            file = _opened(path)
            columns = tuple(file.schema_arrow.names if columns is None else columns)
            _check_columns(file, path, columns, types, self.paths[0])
            for group in range(file.metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(file.metadata.row_group(group).num_rows)
        self.columns = tuple(types)
        self._ends = list(itertools.accumulate(sizes))
        if not len(self):
            raise DataError(f"{folder}: its *.parquet files have no rows")
        self._cache: OrderedDict[int, Row] = OrderedDict()
        self._widths: dict[str, torch.Size] = {}

    @classmethod
    def from_frame(cls, frame: Any, folder: str | Path, columns: Sequence[str] | None = None) -> ParquetRows:
        """Let Spark write a DataFrame to a new folder, which all hosts of the cluster share, and return its rows.

        Args:
            frame: DataFrame of Spark.
            folder: folder that does not exist yet, on a file system that driver, executors and workers all mount.
            columns: columns to read; None: all.

        Raises:
            DataError: it is no such DataFrame, the folder exists, or as the class does.
        """
        if not hasattr(getattr(frame, "write", None), "parquet"):
            kind = f"{type(frame).__module__}.{type(frame).__qualname__}"
            raise DataError(f"a {kind} is no DataFrame of Spark: write it to Parquet yourself and read the folder")
        path = Path(folder).resolve()
        if path.exists():
            raise DataError(f"{folder} exists, and may hold other rows: remove it, or read it with ParquetRows(folder)")
        frame.write.parquet(path.as_uri())  # a path alone would be one of the cluster's default file system
        return cls(path, columns)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[group - 1] if group else 0)
        return {name: column[place].clone() for name, column in self._decoded(group).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Return several rows; each row group is decoded at most once for them."""
        rows = {index: self[index] for index in sorted(set(indices))}
        return [dict(rows[index]) for index in indices]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _decoded(self, group: int) -> Row:
        """Return the columns of a row group; the least recently used one makes room."""
        if group not in self._cache:
            number, within = self._groups[group]
            path = self.paths[number]
            table = _opened(path).read_row_group(within, columns=list(self.columns))
            decoded = {name: _tensor(table.column(name), path, name) for name in self.columns}
            for name, column in decoded.items():
                width = self._widths.setdefault(name, column.shape[1:])
                if column.shape[1:] != width:
                    raise _unequal(path, name)
            self._cache[group] = decoded
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder in the order of their names. Raises DataError if there is none."""
    if folder.is_file():
        return [folder]
    found = [
        path
        for path in sorted(folder.rglob("*.parquet"))
        if path.is_file() and not any(part[0] in "_." for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"{folder}: {'has no *.parquet file' if folder.is_dir() else 'there is no such folder'}")
    return found


def _opened(path: Path) -> Any:
    module = require("pyarrow.parquet", "pyarrow", "parquet")
    try:
        return module.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no Parquet file that can be read: {error}") from error


def _check_columns(file: Any, path: Path, columns: Sequence[str], types: dict[str, Any], first: Path) -> None:
    """Check the columns of a file: they are there, of numbers without empty values, and as in the first file.

    Args:
        file: the file, open.
        path: its path.
        columns: columns to read.
        types: column -> type in the first file; filled if this is the first.
        first: path of the first file.

    Raises:
        DataError: they are not.
    """
    schema, metadata = file.schema_arrow, file.metadata
    if missing := [name for name in columns if name not in schema.names]:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
    for name in columns:
        kind = schema.field(name).type
        _check_numbers(kind, path, name)
        if types.setdefault(name, kind) != kind:
            raise DataError(f"column {name} holds {types[name]} in {first}, and {kind} in {path}: write them alike")
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            empty = chunk.statistics.null_count if chunk.is_stats_set and chunk.statistics.has_null_count else 0
            if empty and chunk.path_in_schema.partition(".")[0] in columns:
                raise _empty(path, chunk.path_in_schema.partition(".")[0])


def _check_numbers(kind: Any, path: Path, name: str) -> None:
    """Raise DataError if a column's type is neither numbers nor lists of them."""
    types = require("pyarrow.types", "pyarrow", "parquet")
    value = kind.value_type if _is_list(kind) else kind
    if not (types.is_integer(value) or types.is_floating(value) or types.is_boolean(value)):
        vector = " (a vector of Spark's ML: vector_to_array makes a list of it)" if types.is_struct(kind) else ""
        raise DataError(f"{path}: column {name} holds {kind}{vector}, no numbers: cast it, or leave it out of columns")


def _is_list(kind: Any) -> bool:
    types = require("pyarrow.types", "pyarrow", "parquet")
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _tensor(column: Any, path: Path, name: str) -> Tensor:
    """Return a column as a tensor whose first dimension is the rows. Raises DataError for empty or unequal values."""
    array = column.combine_chunks()
    if array.null_count:
        raise _empty(path, name)
    if not _is_list(array.type):
        return _numbers(array)
    lengths = set(require("pyarrow.compute", "pyarrow", "parquet").list_value_length(array).to_pylist())
    if len(lengths) > 1:
        raise _unequal(path, name)
    values = array.flatten()
    if values.null_count:
        raise _empty(path, name)
    return _numbers(values).reshape(len(array), *lengths)


def _numbers(array: Any) -> Tensor:
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())


def _empty(path: Path, name: str) -> DataError:
    return DataError(f"{path}: column {name} has empty values (null): fill them first, or leave their rows out")


def _unequal(path: Path, name: str) -> DataError:
    return DataError(f"{path}: the lists of column {name} are not equally long: fill them up to one length")
