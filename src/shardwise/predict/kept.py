"""What is derived from a profile again and again in a search, worked out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Kept:
    """Results by what they are of; they live as long as what they were derived from."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Any, tuple[object, ...]]] = {}

    def once(self, key: object, make: Callable[[], T], *alive: object) -> T:
        """The result of `make` when it was first asked for with this key.

        Args:
            key: tells apart what is made; equal keys mean equal results.
            make: works it out.
            alive: what `key` names by its id, kept so that nothing else gets that.
        """
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = make(), alive
        return cast("T", found[0])
