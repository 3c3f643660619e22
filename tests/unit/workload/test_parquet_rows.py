from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shardwise.errors import DataError, WorkloadError
from shardwise.workload import parquet
from shardwise.workload.parquet import CACHED_GROUPS, ParquetRows
from shardwise.workload.reading.loader import Loader

arrow = pytest.importorskip("pyarrow")


def write(path: Path, columns: Mapping[str, Any], rows: int = 2) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.table(dict(columns)), path, row_group_size=rows)
    return path


def test_rows_of_all_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", {"x": [3, 4, 5], "v": [[1.0, 2.0]] * 3, "t": ["text"] * 3})
    write(tmp_path / "a" / "c.parquet", {"x": [0, 1, 2], "v": [[0.5, 0.25]] * 3, "t": ["text"] * 3})
    write(
        tmp_path / "a" / "empty.parquet",
        {"x": arrow.array([], "int64"), "v": arrow.array([], arrow.list_(arrow.float64())), "t": []},
    )
    write(tmp_path / "_temporary" / "0" / "c.parquet", {"x": [9], "v": [[9.0, 9.0]], "t": [""]})
    write(tmp_path / ".c.parquet", {"x": [9], "v": [[9.0, 9.0]], "t": [""]})
    rows = ParquetRows(tmp_path, ["x", "v"])
    assert [int(rows[index]["x"]) for index in range(len(rows))] == list(range(6))
    assert rows[0]["v"].tolist() == [0.5, 0.25]
    assert [int(row["x"]) for row in rows.__getitems__([5, 0, 5])] == [5, 0, 5]
    with pytest.raises(IndexError):
        rows[6]


def test_a_row_belongs_to_who_reads_it(tmp_path: Path) -> None:
    rows = ParquetRows(write(tmp_path / "a.parquet", {"x": [1.0, 2.0], "flag": [True, False]}))
    rows[0]["x"].add_(1)
    first, second = rows.__getitems__([1, 1])
    first["x"] = second["x"] + 1
    assert float(rows[0]["x"]) == 1
    assert float(second["x"]) == 2
    assert rows.columns == ("x", "flag")
    assert rows[1]["flag"].dtype == torch.bool


def test_row_groups_are_cached_and_do_not_travel(tmp_path: Path) -> None:
    rows = ParquetRows(write(tmp_path / "a.parquet", {"x": list(range(2 * CACHED_GROUPS + 2))}))
    with mock.patch.object(parquet, "_tensor", wraps=parquet._tensor) as decoded:
        rows.__getitems__([3, 0, 2, 1, 0])
        assert decoded.call_count == 2
        for index in range(len(rows)):
            rows[index]
        assert decoded.call_count == CACHED_GROUPS + 1
        copied = pickle.loads(pickle.dumps(rows))
        assert int(copied[5]["x"]) == 5
        assert decoded.call_count == CACHED_GROUPS + 2
        pickle.loads(pickle.dumps(rows)).__getitems__([*range(0, len(rows), 2), *range(1, len(rows), 2)])
        assert decoded.call_count == CACHED_GROUPS + 2 + CACHED_GROUPS + 1


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_read_each_row_once_in_an_epoch(tmp_path: Path, replicas: int) -> None:
    rows = ParquetRows(write(tmp_path / "a.parquet", {"x": list(range(22))}, rows=3))
    orders = []
    for epoch in range(2):
        read: list[int] = []
        for replica in range(replicas):
            loader = Loader(dataset=rows, batch_size=8, replica=replica, parts=(1,) * replicas)
            batches = [each.data["x"] for share in loader.shares(epoch) for each in share.microbatches]
            read += torch.cat(batches).tolist()
        assert sorted(read) == list(range(22))
        orders.append(read)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("columns", "asked", "said"),
    [
        ({"x": [1, 2]}, ["x", "y"], "has no column y; it has x"),
        ({"x": [1, 2]}, "x", r"must be a list of names, \['x'\]"),
        ({"x": ["a", "b"]}, None, "column x holds string, no numbers: cast it, or leave it out"),
        ({"x": [{"size": 2}]}, None, "vector_to_array"),
        ({"x": [["a"]]}, None, r"column x holds list<.*string>, no numbers"),
        ({"x": [1, None]}, None, "column x has empty values"),
        ({"x": [[1.0], None]}, None, "column x has empty values"),
        ({"x": [[1.0, None]]}, None, "column x has empty values"),
        ({"x": [[1.0], [1.0, 2.0, 3.0]]}, None, "lists of column x are not equally long"),
        ({"x": [[1.0], [1.0], [1.0, 2.0]]}, None, "lists of column x are not equally long"),
        ({"x": arrow.array([], "int64")}, None, "have no rows"),
    ],
)
def test_columns_that_are_not_numbers(tmp_path: Path, columns: Any, asked: Any, said: str) -> None:
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=said):
        list(ParquetRows(path, asked).__getitems__([0, len(columns["x"]) - 1]))


def test_empty_values_are_found_before_rows_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1, 2], "y": [1, None]})
    write(tmp_path / "b.parquet", {"x": [1, None], "y": [1, 2]})
    with pytest.raises(DataError, match=r"b\.parquet: column x has empty values"):
        ParquetRows(tmp_path, ["x"])


def test_files_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1, 2]})
    write(tmp_path / "b.parquet", {"x": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"column x holds int64 in .*a\.parquet, and double in .*b\.parquet"):
        ParquetRows(tmp_path)


def test_folders_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \*\.parquet file"):
        ParquetRows(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        ParquetRows(tmp_path / "nowhere")
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(DataError, match=r"a\.parquet: is no Parquet file"):
        ParquetRows(tmp_path)


def test_pyarrow_is_named_where_it_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"x": [1]})
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(WorkloadError, match=r"pyarrow is not installed .* pip install 'shardwise\[parquet\]'"),
    ):
        ParquetRows(path)


class Frame:
    """Stands for a DataFrame of Spark, which writes several files and a mark."""

    def __init__(self) -> None:
        self.write = self

    def parquet(self, uri: str) -> None:
        assert uri.startswith("file:///")
        folder = Path(uri.removeprefix("file://"))
        write(folder / "part-00000.snappy.parquet", {"x": [1, 2]})
        (folder / "_SUCCESS").touch()


def test_a_frame_is_written_once(tmp_path: Path) -> None:
    rows = ParquetRows.from_frame(Frame(), tmp_path / "rows")
    assert [int(rows[index]["x"]) for index in range(2)] == [1, 2]
    with pytest.raises(DataError, match="exists, and may hold other rows"):
        ParquetRows.from_frame(Frame(), tmp_path / "rows")
    with pytest.raises(DataError, match=r"builtins\.dict is no DataFrame of Spark"):
        ParquetRows.from_frame({}, tmp_path / "other")
