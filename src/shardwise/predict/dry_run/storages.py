"""Memory of tensors, by category, from the moments at which their storages are allocated and freed.

The category of a storage is known only afterwards: a tensor of the forward pass is an activation if it outlives the
stretch of the step in which it was made, and temporary if it does not. Storages are therefore logged as they come and
go, and categorized when the step is over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.predict.prediction import Memory

GIVEN = -1
"""Pseudo-stretch (`segment`) of storages that no observed operation made."""


@dataclass(slots=True)
class _Storage:
    """One storage.

    Attributes:
        stretch: stretch of the step in which it was made; GIVEN if no observed operation made it.
        forward: whether it was made in a forward pass or a recomputation.
        size: current bytes.
        found: bytes when it was first seen, if no observed operation made it; else 0.
        resized: whether it was ever resized, as `fully_shard` does with gathered parameters.
        died: stretch in which it was freed; None if it is alive.
    """

    stretch: int
    forward: bool
    size: int
    found: int
    resized: bool = False
    died: int | None = None


class Storages:
    """Log of the storages of tensors that are `seen` or `made`, until it is closed.

    A step is divided into stretches (`stretch` is the number of the current one). A storage that is made in a stretch
    of a forward pass or a recomputation, and alive in the next one, is an activation.
    """

    def __init__(self) -> None:
        self.stretch = 0
        self.forward = False
        self._known: dict[int, int] = {}
        self._storages: list[_Storage] = []
        self._events: list[tuple[int, int]] = []
        self._references: dict[int, Any] = {}
        self._resize = torch.UntypedStorage.resize_
        self._categories: dict[int, str] = {}
        self._elsewhere: set[int] = set()

    # ---- observing --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start to log resizes as well: `fully_shard` frees and allocates gathered parameters by resizing storages."""
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            number = self._number(storage, given=True)
            result = self._resize(storage, size)
            found = self._storages[number]
            found.resized = True
            self._events.append((number, size - found.size))
            found.size = size
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]

    def close(self) -> None:
        """Stop logging: storages that are allocated or freed from here on are ignored."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._references.clear()

    def made(self, tensor: Tensor, *, elsewhere: bool = False) -> int:
        """Log a tensor that an operation returned; `elsewhere` if its memory is not counted (the host's).

        Returns the number of its storage.
        """
        number = self._number(tensor.untyped_storage(), given=False)
        if elsewhere:
            self._elsewhere.add(number)
        return number

    def seen(self, tensor: Tensor) -> int:
        """Log a tensor that an operation was given: if it is unknown, it existed before.

        Returns the number of its storage.
        """
        return self._number(tensor.untyped_storage(), given=True)

    def next(self, *, forward: bool) -> None:
        """Begin another stretch of the step; `forward` if it is part of a forward pass or a recomputation."""
        self.stretch += 1
        self.forward = forward

    def mark(self, tensors: Iterable[Tensor], category: str, *, elsewhere: bool = False) -> None:
        """Assign tensors to a category: `parameters`, `gradients` or `optimizer`. The first assignment holds.

        `elsewhere` if they lie in memory that is not counted (the host's).
        """
        for tensor in tensors:
            number = self._number(tensor.untyped_storage(), given=True)
            self._categories.setdefault(number, category)
            if elsewhere:
                self._elsewhere.add(number)

    def _number(self, storage: torch.UntypedStorage, *, given: bool) -> int:
        key = storage._cdata
        number = self._known.get(key)
        if number is not None:
            return number
        number = self._known[key] = len(self._storages)
        size = storage.nbytes()
        forward = self.forward and not given
        self._storages.append(_Storage(GIVEN if given else self.stretch, forward, size, size if given else 0))
        self._events.append((number, 0 if given else size))
        self._references[number] = weakref.finalize(storage, self._gone, key, number)
        self._references[number].atexit = False
        return number

    def _gone(self, key: int, number: int) -> None:
        if number not in self._references:  # closed
            return
        del self._known[key], self._references[number]
        found = self._storages[number]
        found.died = self.stretch
        self._events.append((number, -found.size))
        found.size = 0

    # ---- looking ----------------------------------------------------------------------------------------------------

    def peak(self) -> Memory:
        """Return the memory at the moment at which it is highest, by category."""
        at = self._highest()
        totals = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "temporary"), 0)
        for number, size in self._sizes_at(at).items():
            totals[self._category(number)] += size
        return Memory(**totals)

    def held(self) -> Mapping[str, int]:
        """Return the bytes alive at the end, by category; they include tensors that are about to be freed."""
        totals: dict[str, int] = {}
        for number, size in self._sizes_at(len(self._changes())).items():
            totals[self._category(number)] = totals.get(self._category(number), 0) + size
        return totals

    def _changes(self) -> list[tuple[int, int]]:
        """Return (storage, change of its size) in order, without the initial size of storages that existed before."""
        changes, seen = [], set()
        for number, change in self._events:
            if number in self._elsewhere:
                continue
            appears = number not in seen and self._is_inner(number)
            seen.add(number)
            changes.append((number, self._storages[number].found if appears else change))
        return changes

    def _is_inner(self, number: int) -> bool:
        """Return whether a storage was allocated inside of a collective: no operation made it, yet it was freed."""
        storage = self._storages[number]
        return storage.stretch == GIVEN and storage.died is not None and number not in self._categories

    def _highest(self) -> int:
        """Return the number of changes up to the peak."""
        total = best = at = 0
        for index, (_, change) in enumerate(self._changes()):
            total += change
            if total > best:
                best, at = total, index + 1
        return at

    def _sizes_at(self, at: int) -> dict[int, int]:
        there = (number for number in range(len(self._storages)) if number not in self._elsewhere)
        sizes = {number: 0 if self._is_inner(number) else self._storages[number].found for number in there}
        for number, change in self._changes()[:at]:
            sizes[number] += change
        return sizes

    def _category(self, number: int) -> str:
        storage = self._storages[number]
        if number in self._categories:
            return self._categories[number]
        if storage.resized:
            return "parameters"  # gathered by fully_shard
        outlives = storage.died is None or storage.died > storage.stretch
        return "activations" if storage.forward and outlives else "temporary"
