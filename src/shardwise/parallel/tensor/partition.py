"""Tensor parallelism for a plain module: from the graph of a step to the graph of one worker.

The operations of the step are processed in order. Each has a rule that says how the result's dimensions depend on those
of its inputs. With it, a sharded dimension stays sharded as far as possible, and inputs that do not fit are exchanged
first:

    linear, x replicated, weight undecided  shard the weight by output features    x enters, the result is sharded
    linear, x sharded by features           shard the weight by input features     the result is a partial sum: reduce
    attention, queries sharded by heads     shard keys and values by the same heads
    convolution                             as linear, by channels
    embedding                               shard the table by words               the result is a partial sum: reduce
    cross entropy, logits sharded by class  without gathering them
    no rule, or the dimension is lost       gather the inputs, compute on every worker

Pairs of layers thus alternate as in Megatron-LM (Shoeybi et al. 2019), wherever they are in the graph. With `sequence`,
partial sums are reduce-scattered along the sequence instead of all-reduced (Korthikanti et al. 2022). A placement that
is not ideal is slow, never wrong.

Implemented in: `partitioner` (making inputs fit), `compute_rules` (operations that compute), `view_rules` (operations
that move elements), `communication`, `vocab_parallel` (embedding and cross entropy), and
`parallel.operators.graph_operators` (dropout and batch norm).
"""

from __future__ import annotations

from collections.abc import Mapping

from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.compute_rules import apply_rule
from shardwise.parallel.tensor.partitioner import LocalGraph, Obstacle, Partitioner, Replacements
from shardwise.parallel.tensor.placement import Placement
from shardwise.workload.trace.graph import StepGraph

MOST_PASSES = 8
"""Largest number of passes, each of which learns how fused weights are best cut; two or three are usual."""


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
    """Build the graph of one worker. Returns it with the dimensions that the number of workers does not divide.

    Args:
        step: the whole step.
        exchange: the tensor-parallel workers.
        replacements: replacements for random, batch-wide and opaque operations.
        trained: names of the parameters that have a gradient.
        sequence: shard activations between sharded layers along the sequence.
        placements: placements of parameters and buffers, if another shape of the same step has decided them.
        summed: parameters whose gradients are summed over the workers, if another shape has decided that.
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
