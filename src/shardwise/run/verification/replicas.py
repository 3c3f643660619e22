"""Replicas that take local steps, played one after the other on one worker: what `local` promises to equal.

Each replica is a program of its own on one worker, which trains on its part of each batch. The averages are computed
here from whole tensors, by the formulas of `parallel.data.local_steps`, and without any of its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shardwise.parallel.optim.clipping import local_gradients
from shardwise.parallel.program import Program
from shardwise.splitting.local_steps import LEARNING_RATE, MOMENTUM, averaged_after, cut_fragments
from shardwise.strategy import Strategy
from shardwise.workload.data import Share
from shardwise.workload.workload import Workload

Tensors = dict[str, Tensor]
"""Whole tensors by their name in the plain module."""


@dataclass(slots=True)
class _Sending:
    """Average of a fragment that is on its way: when it is due, the mean, and what each replica sent."""

    due: int
    mean: Tensors
    sent: list[Tensors]


@dataclass(slots=True)
class PlayedReplicas:
    """Replicas of a strategy with local steps on this worker, from equal weights.

    Args:
        workload: what they train; its model is built once for each of them.
        strategy: strategy with local steps, and its number of microbatches settled.

    Attributes:
        programs: program of each replica.
        losses: mean loss of each replica in the last step.
    """

    workload: Workload
    strategy: Strategy
    programs: list[Program] = field(init=False)
    losses: list[float] = field(init=False, default_factory=list)
    _fragments: list[list[str]] = field(init=False)
    _weights: list[list[float]] = field(init=False)
    _last: Tensors = field(init=False)
    _momentum: Tensors = field(init=False)
    _sending: dict[int, _Sending] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        strategy = self.strategy
        alone = Strategy(microbatches=strategy.microbatches, precision=strategy.precision, states=strategy.states)
        self.programs = [Program.build(self.workload, alone) for _ in range(strategy.dp)]
        first = self.programs[0]
        names = list(first.engine.parameters)
        sizes = [first.engine.parameters[name].nbytes for name in names]
        self._fragments = [[names[index] for index in each] for each in cut_fragments(sizes, strategy.fragments)]
        self._fragments[0] += [
            name
            for name, each in first.engine.held.items()
            if each.tensor.is_floating_point() and not isinstance(each.tensor, torch.nn.Parameter)
        ]
        start = self._tensors(0)
        for number in range(1, strategy.dp):
            self._write(number, start)
        self._weights = [[0.0] * strategy.dp for _ in self._fragments]
        self._last = {name: start[name].clone() for name in names}
        self._momentum = {name: torch.zeros_like(start[name]) for name in names}

    def shares(self, epoch: int) -> Iterator[tuple[Share, ...]]:
        """Yield the shares of all replicas for each step of an epoch."""
        strategy = self.strategy
        columns = range(0, strategy.replicas, strategy.fsdp)
        loader = replace(
            self.programs[0].loader(),
            parts=tuple(sum(strategy.parts[first : first + strategy.fsdp]) for first in columns),
            microbatches=strategy.microbatches,
            uniform=strategy.pp > 1,
        )
        loaders = [replace(loader, replica=number) for number in range(strategy.dp)]
        yield from zip(*(each.shares(epoch) for each in loaders), strict=True)

    def step(self, shares: Sequence[Share]) -> float:
        """Let each replica take a step on its share, and average what is due. Returns the mean loss of the batch."""
        weights = []
        self.losses = []
        for program, share in zip(self.programs, shares, strict=True):
            own = sum(each.samples for each in share.microbatches)
            self.losses.append(float(program.step_share(Share(share.microbatches, max(own, 1)))))
            weights.append(self._weight(share))
        for counted in self._weights:
            counted[:] = [before + weight for before, weight in zip(counted, weights, strict=True)]
        self._average(self.programs[0].steps)
        total = sum(weights)
        return sum(loss * weight / total for loss, weight in zip(self.losses, weights, strict=True) if weight > 0)

    def tensors(self) -> list[Tensors]:
        """Return copies of parameters and buffers of each replica."""
        return [{name: each.clone() for name, each in self._tensors(n).items()} for n in range(len(self.programs))]

    def gradients(self) -> list[Tensors]:
        """Return the gradients of the last step of each replica, after clipping."""
        return [local_gradients(program.engine.parameters) for program in self.programs]

    def _weight(self, share: Share) -> float:
        weigh = self.workload.weight
        found = [
            each.samples if weigh is None else float(weigh(each.data)) for each in share.microbatches if each.samples
        ]
        return float(sum(found))

    def _average(self, steps: int) -> None:
        self._merge(steps)
        number = averaged_after(steps, self.strategy.local, self.strategy.fragments)
        if number is None:
            return
        weights, names = self._weights[number], self._fragments[number]
        total = sum(weights)
        shares = [weight / total if total > 0 else 1 / len(weights) for weight in weights]
        everybody = self.tensors()
        mean = {
            name: sum_of([each[name] * share for each, share in zip(everybody, shares, strict=True)]) for name in names
        }
        self._sending[number] = _Sending(steps + self.strategy.delay, mean, everybody)
        self._weights[number] = [0.0] * len(weights)
        self._merge(steps)

    @torch.no_grad()
    def _merge(self, steps: int) -> None:
        for number in [number for number, each in self._sending.items() if each.due <= steps]:
            arrived = self._sending.pop(number)
            new = {name: self._outer(name, mean) for name, mean in arrived.mean.items()}
            for replica, sent in enumerate(arrived.sent):
                now = self._tensors(replica)
                self._write(replica, {name: each + now[name] - sent[name] for name, each in new.items()})

    def _outer(self, name: str, mean: Tensor) -> Tensor:
        if self.strategy.outer == "average" or name not in self._last:
            return mean
        gradient = self._last[name] - mean
        self._momentum[name] = MOMENTUM * self._momentum[name] + gradient
        self._last[name] = self._last[name] - LEARNING_RATE * (gradient + MOMENTUM * self._momentum[name])
        return self._last[name]

    def _tensors(self, replica: int) -> Tensors:
        return {name: each.tensor.detach() for name, each in self.programs[replica].engine.held.items()}

    @torch.no_grad()
    def _write(self, replica: int, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.programs[replica].engine.held[name].tensor.copy_(value)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def mean_of(tensors: Sequence[Tensors]) -> Tensors:
    """Return the mean of each tensor over the replicas that have it; of whole numbers the first one's."""
    found = {}
    for name in dict.fromkeys(name for each in tensors for name in each):
        values = [each[name] for each in tensors if name in each]
        found[name] = sum_of(values) / len(values) if values[0].is_floating_point() else values[0].clone()
    return found
