"""What the workers tell each other beside the training: short texts, as bytes in tensors, so nothing is unpickled."""

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
    """A question to all workers that has been asked (see `Workers.vote`)."""

    votes: Tensor
    asked: Any

    def unanimous(self) -> bool:
        """Return whether all workers agreed, once all have been asked."""
        if self.asked is not None:
            self.asked.wait()
        return bool(self.votes.item())


class Workers:
    """All workers of the default process group, on a group of their own.

    A thread in the background talks on it while the training talks on its groups: they must not mix. It is a gloo group
    on every machine, because what is said is small and lies in main memory. Creating it is collective.
    """

    def __init__(self) -> None:
        together = dist.is_initialized()
        self.group: dist.ProcessGroup | None = (
            dist.new_group(backend="gloo", group_desc="checkpoints") if together else None
        )
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    def exchange(self, text: str) -> list[str]:
        """Everybody's text, by rank. Collective."""
        if self.count == 1:
            return [text]
        data = text.encode()
        lengths = self._gather(torch.tensor([len(data)]))
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(data.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        parts = self._gather(padded)
        return [bytes(part[: int(n)].tolist()).decode() for part, n in zip(parts, lengths, strict=True)]

    def numbers(self, number: int) -> list[int]:
        """Everybody's number, by rank, in one small message. Collective."""
        return [number] if self.count == 1 else [int(each) for each in self._gather(torch.tensor([number]))]

    def raise_first(self, problem: str, error: type[ShardwiseError]) -> None:
        """Raises `error` on all workers where one of them has a `problem` (not empty): the first one's. Collective."""
        for found in self.exchange(problem):
            if found:
                raise error(found)

    def all_or_none(self, action: Callable[[], _Value], error: type[ShardwiseError]) -> _Value:
        """Return what `action` gives here, unless it raised `error` on one of the workers: then all do. Collective."""
        value, problem = None, ""
        try:
            value = action()
        except error as raised:
            problem = str(raised)
        self.raise_first(problem, error)
        return cast("_Value", value)

    def anywhere(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set on any worker; all have as many flags. Collective."""
        union = torch.tensor(flags, dtype=torch.uint8)
        if self.count > 1:
            dist.all_reduce(union, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in union.tolist()]

    def vote(self, agrees: bool) -> Vote:
        """Begin to ask whether all workers agree; what they do meanwhile does not wait for the answer. Collective."""
        votes = torch.tensor([agrees], dtype=torch.uint8)
        asked = None if self.count == 1 else dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.group, async_op=True)
        return Vote(votes, asked)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts
