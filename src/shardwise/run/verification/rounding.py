"""Tolerance for rounding in a comparison of two runs.

It follows from the dtype and the longest sum in a step. Parallel runs add summands in another
order, which leaves an error that grows with the square root of their number (Higham 1993, section 4), for each of the
successive operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shardwise.parallel.program import Program
from shardwise.workload.data import Share

SAFETY = 16.0
"""Factor of the tolerance over the expected growth of rounding errors."""

HALF_TOLERANCE = 0.1
"""Tolerance for bf16, of which only eight bits of a number survive each operation, so that runs drift apart."""


def rounding(program: Program, share: Share, *, float64: bool) -> float:
    """Return the relative error up to which two runs count as equal: SAFETY * eps * sqrt(summands) * sqrt(layers).

    Args:
        program: program that is compared with one worker.
        share: share of a step, whose batch gives the length of the sums.
        float64: True if both compute in double precision.
    """
    if program.strategy.in_bf16(program.workload.precision):
        return HALF_TOLERANCE
    shapes = [held.layout.shape for held in program.engine.held.values()]
    widest = max((max(shape, default=1) for shape in shapes), default=1)
    leaves = [leaf for m in share.microbatches for leaf in tree_leaves(m.data) if isinstance(leaf, Tensor)]
    positions = max((leaf.numel() for leaf in leaves), default=1) * program.strategy.replicas
    layers = sum(len(shape) > 1 for shape in shapes) * program.strategy.pp
    eps = torch.finfo(torch.float64 if float64 else torch.float32).eps
    return SAFETY * eps * math.sqrt(max(widest, positions)) * math.sqrt(max(layers, 1))
