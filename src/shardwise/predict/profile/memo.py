"""Memo table for values that a search derives from a profile again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Memo:
    """Memo table: results by key. It belongs to one object and lives as long as that object."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Any, tuple[object, ...]]] = {}

    def once(self, key: object, make: Callable[[], T], *alive: object) -> T:
        """Return the memoized result for `key`; call `make` only the first time that the key is asked for.

        Args:
            key: identifies the result; equal keys mean equal results.
            make: computes the result.
            alive: objects that `key` names by their `id()`. They are kept alive so that Python gives no other object
                the same id.
        """
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = make(), alive
        return cast("T", found[0])
