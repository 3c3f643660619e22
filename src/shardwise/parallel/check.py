"""Check from a model's graph that a strategy can work for it, before any worker starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shardwise.errors import StrategyError
from shardwise.parallel.graph.loss_pieces import cut_loss
from shardwise.parallel.graph.trace import traced
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.pipeline.cut_points import common, find_cut_points, positions
from shardwise.parallel.pipeline.stream import tied_stages
from shardwise.parallel.pipeline.subgraphs import sections
from shardwise.parallel.state.build_model import plain_model
from shardwise.parallel.state.mode_changes import check_modes
from shardwise.parallel.state.parameter_hooks import check_hooks, take_hooks
from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.overlap import overlap
from shardwise.parallel.tensor.partition import partition
from shardwise.parallel.tensor.partitioner import LocalGraph, Obstacle, Replacements
from shardwise.splitting.balance import check_stages
from shardwise.strategy import Strategy
from shardwise.workload.trace.graph import StepGraph, example
from shardwise.workload.workload import Workload

LEAST_SHARED = 0.5
"""Smallest share of the parameters (0 to 1) that a tensor degree must shard; a degree that shards less is refused."""

HEADS = "attention heads"
"""Name for the user of the heads that a degree fails to divide."""

DEGREES = (2, 3, 4, 6, 8, 12, 16)
"""Tensor degrees that an error message may propose in place of one that does not fit."""


def check_strategy(workload: Workload, strategy: Strategy) -> None:
    """Raise StrategyError if `strategy` cannot work for this model, or WorkloadError if the step cannot be traced.

    Traces the model in this process and starts no worker.
    """
    strategy = strategy.for_batch(workload.batch_size)
    if strategy.runs_module:
        return
    with random_state_kept():
        model = plain_model(workload)
    check_hooks(take_hooks(model), replaced=True)
    check_modes(model, workload, strategy)
    batch = example(workload, strategy.samples_of(0, workload.batch_size))
    step = traced(workload, model, batch)
    parameters = dict(model.named_parameters())
    trained = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
    if strategy.tp > 1:
        refusal = TensorDegrees(step, parameters).refusal(strategy.tp, sequence=bool(strategy.sp))
        if refusal is not None:
            raise StrategyError(refusal)
    if strategy.loss_pieces:
        local, _ = split(step, strategy.tp, trained, sequence=bool(strategy.sp))
        tokens = cut_loss(local, strategy.loss_pieces, _never)
        if tokens < strategy.loss_pieces:
            raise StrategyError(
                f"loss_pieces={strategy.loss_pieces}: the loss of a microbatch has {tokens} tokens; use {tokens} "
                "pieces or fewer"
            )
    if strategy.pp > 1:
        local, _ = split(step, strategy.tp, trained, sequence=bool(strategy.sp))
        if strategy.schedule != "zero-bubble":
            overlap(local.graph, step.tensors, direct=bool(strategy.compile))
        found = find_cut_points(local, parameters)
        if workload.evaluations:
            evaluation = traced(workload, model, batch, training=False)
            whole, _ = split(evaluation, strategy.tp, trained, sequence=bool(strategy.sp))
            found = common(found, find_cut_points(whole, parameters))
        check_stages(strategy, len(found))
        if strategy.delayed:
            ends = sections(local, positions(local, [found[0].use, found[-1].use], parameters))
            tied = [name for name in ends[0].tensors if name in ends[-1].tensors and name in trained]
            if tied:  # wherever the step is cut
                raise StrategyError(tied_stages(tied[0]))


def split(
    step: StepGraph, ranks: int, trained: frozenset[str], *, sequence: bool = False
) -> tuple[LocalGraph, tuple[Obstacle, ...]]:
    """Return the graph of the first of `ranks` tensor-parallel workers and its obstacles.

    The graph is for inspection: it cannot run.
    """
    nothing = Replacements(*(_never,) * 5)
    return partition(step, Exchange(None, 0, ranks), nothing, trained=trained, sequence=sequence)


def _never(*_: Any) -> Any:
    raise AssertionError("this graph is for looking at")


@dataclass(slots=True)
class TensorDegrees:
    """Tensor degrees that a traced step can be sharded by.

    Attributes:
        step: the traced step of one microbatch.
        parameters: the model's parameters by name.
    """

    step: StepGraph
    parameters: Mapping[str, nn.Parameter]
    _known: dict[tuple[int, bool], tuple[str | None, float]] = field(default_factory=dict)

    def refusal(self, degree: int, *, sequence: bool = False) -> str | None:
        """Return an error message that names what `degree` fails to divide and the degrees that fit.

        Returns None if `degree` fits, or if no degree divides the heads but this one shards enough of the other layers
        (71 heads, multi-query: the MLPs are sharded, attention is computed whole on every worker).
        """
        wrong, shared = self._looked_at(degree, sequence)
        if wrong is None:
            return None
        fitting = [str(other) for other in DEGREES if self._looked_at(other, sequence)[0] is None]
        if not fitting and wrong.endswith(HEADS) and shared >= LEAST_SHARED:
            return None
        hint = f"use tp={' or '.join(fitting)}" if fitting else "no tensor degree fits this model, use dp, fsdp or pp"
        return f"tp={degree} does not divide {wrong}: {hint}"

    def _looked_at(self, degree: int, sequence: bool) -> tuple[str | None, float]:
        """Return the reason why a degree is of no use, if there is one, and the share of the parameters it shards."""
        if (degree, sequence) not in self._known:
            trained = frozenset(name for name, parameter in self.parameters.items() if parameter.requires_grad)
            local, obstacles = split(self.step, degree, trained, sequence=sequence)
            shared = local.sharded_share(self.parameters) if self.parameters else 1.0
            self._known[degree, sequence] = _in_the_way(degree, obstacles, shared), shared
        return self._known[degree, sequence]


def _in_the_way(degree: int, obstacles: Sequence[Obstacle], shared: float) -> str | None:
    """Return the reason why a tensor degree, which shards a share of the parameters, is of no use; None if it works."""
    for obstacle in obstacles:
        # too few key heads are replicated, but query heads are what attention is sharded by
        if obstacle.what == "query heads" or (obstacle.what == "heads" and degree % obstacle.size):
            return f"the {obstacle.size} {HEADS}"
    features = [o.what for o in obstacles if o.what not in ("heads", "query heads")]
    if shared < LEAST_SHARED:
        return features[0] if features else "anything: no layer of the model can be cut"
    return None
