"""Memo table for values that a search derives from a profile again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

_MISSING = object()


class Same(Generic[T]):
    """Part of a key that stands for one object: equal only for this very object, however large or alike others are.

    The key holds the object, so that none made later can be taken for it.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


class Memo:
    """Memo table: results by key. It belongs to one object and lives as long as that object."""

    def __init__(self) -> None:
        self._known: dict[object, Any] = {}

    def forget(self) -> None:
        """Drop all results, because something that keys do not name has changed."""
        self._known.clear()

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return the memoized result for `key`; call `make` only the first time that the key is asked for.

        Args:
            key: identifies the result; equal keys mean equal results. An object that is costly to compare, or has no
                value, is named by `Same`.
            make: computes the result.
        """
        found = self._known.get(key, _MISSING)
        if found is _MISSING:
            found = self._known[key] = make()
        return cast("T", found)
