"""A profile's memo is worked out once, and never found under the name of something that is gone."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path

from shardwise.predict.profile.memo import Memo, Same

SOURCE = Path(__file__).parents[4] / "src"


class Named:
    """Something that keys name without comparing it."""


def test_each_key_is_worked_out_once() -> None:
    memo = Memo()
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return key.upper()

    assert [memo.once(key, lambda key=key: make(key)) for key in ("a", "b", "a")] == ["A", "B", "A"]  # type: ignore[misc]
    assert made == ["a", "b"]


def test_what_a_key_names_stays() -> None:
    memo, named = Memo(), Named()
    memo.once(("named", Same(named)), lambda: 1)
    gone = weakref.ref(named)
    del named
    gc.collect()
    assert gone() is not None


def test_equal_objects_are_not_the_same() -> None:
    one, other = [1], [1]
    assert one == other
    memo = Memo()
    assert [memo.once(Same(each), object) for each in (one, one)] == [memo.once(Same(one), object)] * 2
    assert memo.once(Same(other), object) is not memo.once(Same(one), object)


def test_nothing_is_a_result_too() -> None:
    memo = Memo()
    made: list[None] = []
    assert [memo.once("none", lambda: made.append(None)) for _ in range(2)] == [None, None]
    assert len(made) == 1


def test_no_table_names_an_object_by_its_id() -> None:
    """An id says nothing about who holds the object: only `Same` does, which keeps it."""
    tables = [path for path in SOURCE.rglob("*.py") if ".once(" in path.read_text()]
    assert len(tables) > 8
    assert [path.name for path in tables if re.search(r"key = .*\bid\(|once\(.*\bid\(", path.read_text())] == []
