"""Balance the segments of a step over pipeline stages, and those of a stage over blocks to gather or recompute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from shardwise.errors import StrategyError
from shardwise.splitting.chain_partition import balanced
from shardwise.strategy import Strategy

BYTES_PER_SECOND = {"cpu": 1e9, "gpu": 2.5e10}
"""Assumed bandwidth in bytes per second between stages, only used to choose between cuts.

gloo between processes reaches about the first, a 200 Gb/s adapter the second. Links that are much slower have factors
(`slow_links.much_slower`).
"""

PIECES = 2
"""Pieces of a block, which is gathered, freed, recomputed and compiled as a unit. A piece lies between two neighbouring
cut points with the fewest bytes: a layer of a transformer has two, attention and perceptron."""

Cuts = tuple[tuple[int, ...], ...]
"""First segments of the blocks of each stage.

A segment is the piece of the step between two neighbouring cut points.
"""


def divided(
    costs: Sequence[float],
    messages: Sequence[float],
    stages: int,
    device: str,
    *,
    speeds: Sequence[int] = (),
    slower: Sequence[float] = (),
    in_blocks: bool,
) -> list[list[int]]:
    """Return the first segments of the blocks of each stage.

    Every cut sends something. The cost of a cut is therefore only the time of its bytes beyond those of the cheapest
    one.

    Args:
        costs: seconds of each segment of a step.
        messages: bytes to send at each cut point between two segments.
        stages: number of stages.
        device: kind of device that sends them, `cpu` or `gpu`.
        speeds: speed of the worker of each stage. Empty: all are equally fast.
        slower: how many times slower than assumed the link from each worker to the next is. Empty: as assumed.
        in_blocks: whether stages are cut into blocks.
    """
    starts = stage_starts(costs, messages, stages, device, speeds, slower)
    return blocks_from(costs, messages, starts, in_blocks=in_blocks)


def stage_starts(
    costs: Sequence[float],
    messages: Sequence[float],
    stages: int,
    device: str,
    speeds: Sequence[int] = (),
    slower: Sequence[float] = (),
) -> list[int]:
    """Return the first segment of each stage; see `divided`."""
    least = min(messages, default=0)
    sends = [(size - least) / BYTES_PER_SECOND[device] for size in messages]
    of_stages = [slower[stage % len(slower)] for stage in range(stages - 1)] if slower else []
    return [0, *balanced(costs, sends, stages, speeds, of_stages)]


def blocks_from(
    costs: Sequence[float], messages: Sequence[float], starts: Sequence[int], *, in_blocks: bool
) -> list[list[int]]:
    """Return the first segments of the blocks of each stage, for stages that begin at `starts`; see `divided`."""
    if not in_blocks:
        return [[start] for start in starts]
    known: dict[object, list[int]] = {}  # most stages of a deep model are equal
    found = []
    for first, end in pairwise([*starts, len(costs)]):
        own = tuple(costs[first:end]), tuple(messages[first : end - 1])
        if own not in known:
            known[own] = _block_starts(*own)
        found.append([first, *(first + start for start in known[own])])
    return found


def cuts_blocks(strategy: Strategy) -> bool:
    """Return whether a strategy gathers, recomputes or compiles a stage in parts."""
    return strategy.recomputes or strategy.splits_parameters or bool(strategy.compile)


def recomputed_blocks(strategy: Strategy, blocks: int, *, last: bool) -> int:
    """Return how many blocks of a stage of a graph are recomputed, from the first; arguments as of `recomputable`."""
    return strategy.recomputed_of(recomputable(strategy, blocks, last=last))


def recomputable(strategy: Strategy, blocks: int, *, last: bool) -> int:
    """Return how many of the blocks of a stage recomputation may take, from the first.

    The last block of the last stage is left out: its backward pass follows its forward pass, unless all forward passes
    come first (`gpipe`).

    Args:
        strategy: the strategy.
        blocks: number of blocks of the stage.
        last: whether it is the last stage.
    """
    at_once = strategy.pp > 1 and strategy.schedule == "gpipe"
    return blocks - 1 if last and blocks > 1 and not at_once else blocks


def check_stages(strategy: Strategy, cut_points: int) -> None:
    """Raise StrategyError if a step with `cut_points` cut points has fewer parts than `strategy` has stages."""
    stages = strategy.pp * strategy.stages_per_worker
    if stages > cut_points + 1:
        per_worker = f" with {strategy.stages_per_worker} stages each" if strategy.stages_per_worker > 1 else ""
        raise StrategyError(
            f"pp={strategy.pp}{per_worker}: the model's graph can be cut into {cut_points + 1} stages at most: "
            + _fewer_stages(strategy, cut_points + 1)
        )


def _fewer_stages(strategy: Strategy, most: int) -> str:
    """Return advice for a graph that can be cut into `most` stages."""
    if most == 1:
        return "use dp, fsdp or tp"
    if most < strategy.pp:
        return f"use pp={most} or fewer"
    return "use schedule=1f1b" if most < 2 * strategy.pp else f"use stages={most // strategy.pp}"


def _block_starts(costs: Sequence[float], messages: Sequence[float]) -> list[int]:
    """Return the segments of a stage, counted from its first, at which blocks begin.

    The first block, at 0, is left out.

    Blocks begin at cut points with the fewest bytes to save, evenly spread by cost.
    """
    least = min(messages, default=0)
    narrow = [index + 1 for index, size in enumerate(messages) if size <= least]
    if not narrow:
        return []
    bounds = [0, *narrow, len(costs)]
    merged = [sum(costs[a:b]) for a, b in pairwise(bounds)]
    count = -(-len(merged) // PIECES)
    return [bounds[start] for start in balanced(merged, [0.0] * (len(merged) - 1), count)]
