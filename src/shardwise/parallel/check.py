"""Whether a strategy can work for a model, found from its graph before any worker starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardwise.errors import StrategyError
from shardwise.parallel.cuts import common, places
from shardwise.parallel.exchange import Exchange
from shardwise.parallel.model import plain_model
from shardwise.parallel.partitioner import LocalGraph, Obstacle, Replacements
from shardwise.parallel.planning import check_stages
from shardwise.parallel.tensor import partition
from shardwise.parallel.traced import traced
from shardwise.strategy import Strategy
from shardwise.workload.graph import StepGraph, example
from shardwise.workload.workload import Workload

LEAST_SHARED = 0.5
"""A tensor degree that cuts less than this share of the parameters is refused."""

DEGREES = (2, 3, 4, 6, 8, 12, 16)
"""Tensor degrees that are proposed in place of one that does not fit."""


def check_strategy(workload: Workload, strategy: Strategy) -> None:
    """Raises StrategyError where `strategy` cannot work for this model; WorkloadError where it cannot be traced.

    Traces the model in this process; starts nothing.
    """
    strategy = strategy.for_batch(workload.batch_size)
    if strategy.tp == strategy.pp == 1:
        return
    with torch.random.fork_rng():
        model = plain_model(workload)
    batch = example(workload, strategy.samples_of(0, workload.batch_size))
    step = traced(workload, model, batch)
    parameters = dict(model.named_parameters())
    trained = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
    if strategy.tp > 1:
        refusal = TensorDegrees(step, parameters).refusal(strategy.tp, sequence=bool(strategy.sp))
        if refusal is not None:
            raise StrategyError(refusal)
    if strategy.pp > 1:
        found = places(split(step, 1, trained)[0], parameters)
        if workload.evaluation is not None:
            evaluation = traced(workload, model, batch, training=False)
            found = common(found, places(split(evaluation, 1, trained)[0], parameters))
        check_stages(strategy, len(found))


def split(
    step: StepGraph, ranks: int, trained: frozenset[str], *, sequence: bool = False
) -> tuple[LocalGraph, tuple[Obstacle, ...]]:
    """The graph of the first of `ranks` tensor-parallel workers, to look at: nothing of it can run."""
    nothing = Replacements(_never, _never, _never, _never)
    return partition(step, Exchange(None, 0, ranks), nothing, trained=trained, sequence=sequence)


def _never(*_: Any) -> Any:
    raise AssertionError("this graph is for looking at")


@dataclass(slots=True)
class TensorDegrees:
    """Which tensor degrees a traced step can be cut into.

    Attributes:
        step: of one microbatch.
        parameters: of the model, by name.
    """

    step: StepGraph
    parameters: Mapping[str, nn.Parameter]
    _known: dict[tuple[int, bool], str | None] = field(default_factory=dict)

    def refusal(self, degree: int, *, sequence: bool = False) -> str | None:
        """What a degree fails to divide, and which would do; None where it can be."""
        wrong = self._wrong(degree, sequence=sequence)
        if wrong is None:
            return None
        fitting = [str(other) for other in DEGREES if self._wrong(other, sequence=sequence) is None]
        hint = f"use tp={' or '.join(fitting)}" if fitting else "no tensor degree fits this model, use dp, fsdp or pp"
        return f"tp={degree} does not divide {wrong}: {hint}"

    def _wrong(self, degree: int, *, sequence: bool) -> str | None:
        key = degree, sequence
        if key not in self._known:
            self._known[key] = self._looked_at(degree, sequence=sequence)
        return self._known[key]

    def _looked_at(self, degree: int, *, sequence: bool) -> str | None:
        trained = frozenset(name for name, parameter in self.parameters.items() if parameter.requires_grad)
        local, obstacles = split(self.step, degree, trained, sequence=sequence)
        return _in_the_way(degree, local, obstacles, self.parameters)


def _in_the_way(
    degree: int, local: LocalGraph, obstacles: Sequence[Obstacle], parameters: Mapping[str, nn.Parameter]
) -> str | None:
    """What a tensor degree fails to divide so that it is of no use; None where it is."""
    for obstacle in obstacles:
        # fewer key heads than workers are copied; query heads are what there is to cut
        if obstacle.what == "query heads" or (obstacle.what == "heads" and degree % obstacle.size):
            return f"the {obstacle.size} attention heads"
    features = [o.what for o in obstacles if o.what not in ("heads", "query heads")]
    if parameters and local.sharded_share(parameters) < LEAST_SHARED:
        return features[0] if features else "anything: no layer of the model can be cut"
    return None
