"""Order of a pipeline worker's passes as NumPy arrays: `splitting.schedule.order`, fast enough for a search.

A pass is (kind, chunk): an index into KINDS, and an index into the worker's stages. Tests compare both with the tables
that the program executes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardwise.splitting.schedule import BACKWARD, FORWARD, INPUT, WEIGHT
from shardwise.strategy import Strategy

KINDS = (FORWARD, BACKWARD, INPUT, WEIGHT)
FORWARDS, BACKWARDS, INPUTS, WEIGHTS = range(len(KINDS))

Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


def sequence(strategy: Strategy, pipeline_rank: int) -> tuple[Integers, Integers]:
    """Return (kinds, chunks) of the passes of one step on pipeline worker `pipeline_rank`, in its order."""
    workers, stages, count = strategy.pp, strategy.stages_per_worker, strategy.microbatches
    if workers == 1 or strategy.schedule == "gpipe" or (strategy.schedule == "interleaved" and count % workers):
        return _gpipe(stages, count) if workers > 1 else _alone(stages, count)
    if strategy.schedule == "zero-bubble":
        kinds = _zero_bubble(pipeline_rank, workers, count, last_whole=strategy.splits_parameters)
        return kinds, np.zeros_like(kinds)
    total = count * stages
    ahead = workers - pipeline_rank - 1
    if strategy.schedule == "interleaved":
        ahead = 2 * ahead + (stages - 1) * workers
    forward = np.arange(total) // workers % stages if stages > 1 else np.zeros(total, np.int64)
    return _alternating(forward, stages - 1 - forward, min(ahead, total))


def _alone(stages: int, count: int) -> tuple[Integers, Integers]:
    chunks = np.arange(stages)
    return np.tile(np.repeat([FORWARDS, BACKWARDS], stages), count), np.tile(
        np.concatenate([chunks, chunks[::-1]]), count
    )


def _gpipe(stages: int, count: int) -> tuple[Integers, Integers]:
    chunks = np.repeat(np.arange(stages), count)
    return np.repeat([FORWARDS, BACKWARDS], stages * count), np.concatenate([chunks, chunks[::-1]])


def _alternating(forward: Integers, backward: Integers, ahead: int) -> tuple[Integers, Integers]:
    """Return `ahead` forwards, then pairs of a forward and a backward, then the backwards that are left."""
    pairs = len(forward) - ahead
    kinds = np.concatenate([np.full(ahead, FORWARDS), np.tile([FORWARDS, BACKWARDS], pairs), np.full(ahead, BACKWARDS)])
    chunks = np.empty(2 * len(forward), np.int64)
    chunks[kinds == FORWARDS], chunks[kinds == BACKWARDS] = forward, backward
    return kinds, chunks


def _zero_bubble(pipeline_rank: int, workers: int, count: int, *, last_whole: bool) -> Integers:
    """Return the kinds only: each worker has a single stage.

    If `last_whole` is set, the last backward pass is not split, and all earlier weight gradients precede it.
    """
    plain, _ = _alternating(
        np.zeros(count, np.int64), np.zeros(count, np.int64), min(workers - pipeline_rank - 1, count)
    )
    found: list[int] = []
    pending = done = 0
    for kind in plain.tolist():
        if kind == FORWARDS:
            found.append(FORWARDS)
            continue
        done += 1
        if last_whole and done == count:
            return np.array([*found, *[WEIGHTS] * pending, BACKWARDS])
        found.append(INPUTS)
        pending += 1
        if pending > pipeline_rank:
            found.append(WEIGHTS)
            pending -= 1
    return np.array([*found, *[WEIGHTS] * pending])
