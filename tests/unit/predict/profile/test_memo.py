"""What a profile keeps: worked out once, and never found under the id of something that is gone."""

from __future__ import annotations

import gc
import weakref

from shardwise.predict.profile.memo import Memo


class Named:
    """Something that keys name by its id."""


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
    memo.once(id(named), lambda: 1, named)
    gone = weakref.ref(named)
    del named
    gc.collect()
    assert gone() is not None
