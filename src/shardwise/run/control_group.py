"""Messages between workers beside the training: short texts, sent as bytes in tensors, so that nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import ShardwiseError

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Vote:
    """Vote of all workers in flight, see `Workers.vote`."""

    votes: Tensor
    asked: Any

    def unanimous(self) -> bool:
        """Wait until all workers have voted, and return whether all agreed."""
        if self.asked is not None:
            self.asked.wait()
        return bool(self.votes.item())


class Workers:
    """All workers of the default process group, connected by a process group of their own.

    A background thread uses this group while the training uses its own groups, and their messages must not mix. It is a
    gloo group on every machine, because the messages are small and in main memory. Creating it is collective.
    """

    def __init__(self) -> None:
        together = dist.is_initialized()
        self.group: dist.ProcessGroup | None = (
            dist.new_group(backend="gloo", group_desc="checkpoints") if together else None
        )
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    def exchange(self, text: str) -> list[str]:
        """All-gather a text of each worker; return the texts by rank. Collective."""
        if self.count == 1:
            return [text]
        data = text.encode()
        lengths = self._gather(torch.tensor([len(data)]))
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(data.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        parts = self._gather(padded)
        return [bytes(part[: int(n)].tolist()).decode() for part, n in zip(parts, lengths, strict=True)]

    def numbers(self, *numbers: int) -> list[list[int]]:
        """All-gather a few whole numbers of each worker in one small message; return them by rank. Collective."""
        return [list(numbers)] if self.count == 1 else [each.tolist() for each in self._gather(torch.tensor(numbers))]

    def raise_first(self, problem: str, error: type[ShardwiseError]) -> None:
        """Raise `error` on all workers with the first non-empty `problem` of any worker, by rank. Collective."""
        for found in self.exchange(problem):
            if found:
                raise error(found)

    def all_or_none(self, action: Callable[[], _Value], error: type[ShardwiseError]) -> _Value:
        """Return the result of `action`; if it raises `error` on any worker, all workers raise it. Collective."""
        value, problem = None, ""
        try:
            value = action()
        except error as raised:
            problem = str(raised)
        self.raise_first(problem, error)
        return cast("_Value", value)

    def anywhere(self, flags: list[bool]) -> list[bool]:
        """Return for each flag whether it is set on any worker; all workers have equally many flags. Collective."""
        union = torch.tensor(flags, dtype=torch.uint8)
        if self.count > 1:
            dist.all_reduce(union, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in union.tolist()]

    def vote(self, agrees: bool) -> Vote:
        """Start an asynchronous all-reduce of whether all workers agree, and return the vote in flight. Collective."""
        votes = torch.tensor([agrees], dtype=torch.uint8)
        asked = None if self.count == 1 else dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.group, async_op=True)
        return Vote(votes, asked)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts
