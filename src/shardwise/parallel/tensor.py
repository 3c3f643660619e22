"""Tensor parallelism for a module that knows nothing of it: from the graph of a step to the graph of one worker.

The step's operations are taken in their order. Each has a rule that says how its dimensions depend on those of its
inputs; with it, what is sharded stays sharded as far as it goes, and what does not fit is exchanged before:

    linear, x replicated, weight free      cut the weight by output features      x enters, the result is sharded
    linear, x sharded by features          cut the weight by input features       the result is a sum: reduce
    attention, queries sharded by heads    keys and values by the same heads
    convolution                            as linear, by channels
    embedding                              cut the table by words                 the result is a sum: reduce
    cross entropy, logits cut by classes   without gathering them
    no rule, or a dimension that is lost   gather the inputs, compute on every worker

So pairs of layers alternate as in Megatron-LM (Shoeybi et al. 2019), wherever they are in the graph. With `sequence`,
sums are scattered along the sequence in place of reduced (Korthikanti et al. 2022). A placement that is not ideal is
slow, never wrong.

Implemented in: `partitioner` (how inputs are made to fit), `rules` (what computes), `structure` (what only moves),
`exchange` (what is sent), `vocabulary` (embedding and cross entropy), `keyed` (dropout and batch norm).
"""

from __future__ import annotations

from collections.abc import Mapping

from shardwise.parallel.exchange import Exchange
from shardwise.parallel.partitioner import LocalGraph, Obstacle, Partitioner, Replacements
from shardwise.parallel.placement import Placement
from shardwise.parallel.rules import apply_rule
from shardwise.workload.graph import StepGraph

MOST_PASSES = 8
"""Each pass learns how fused weights are best cut; more than two or three are not seen."""


def partition(
    step: StepGraph,
    exchange: Exchange,
    replacements: Replacements,
    *,
    trained: frozenset[str],
    sequence: bool = False,
    placements: Mapping[str, Placement] | None = None,
    summed: frozenset[str] | None = None,
) -> tuple[LocalGraph, tuple[Obstacle, ...]]:
    """The graph of one worker, and the dimensions that the number of workers does not divide.

    Args:
        step: the whole step.
        exchange: the tensor-parallel workers.
        replacements: what replaces random operations.
        trained: names of the parameters that have a gradient.
        sequence: shard activations between sharded layers along the sequence.
        placements: of parameters and buffers, where another shape of the same step has decided them.
        summed: parameters whose gradients are added up over the workers, where another shape has decided that.
    """
    wanted: dict[tuple[str, int], tuple[int, ...]] = {}
    for _ in range(MOST_PASSES):
        attempt = Partitioner(
            step,
            exchange,
            replacements,
            apply_rule,
            trained=trained,
            sequence=sequence,
            placements=placements,
            summed=summed,
            wanted=wanted,
        )
        local = attempt.run()
        if attempt.learnt == wanted:
            break
        wanted = attempt.learnt
    return local, tuple(attempt.obstacles)
