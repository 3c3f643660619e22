"""Tolerance for rounding in a comparison of two runs.

float32, float64    It follows from the longest sum in a step. Parallel runs add summands in another order, which leaves
                    an error that grows with the square root of their number (Higham 1993, section 4), for each of the
                    successive operations.
bf16, autocast      Sums inside of products are in float32 and count for nothing; what counts is how often a value is
                    rounded to bfloat16 on its way from the batch to a gradient. Errors of n roundings in a row that are
                    independent and zero on average grow as sqrt(n), not as n (Higham and Mary 2019, "A new approach to
                    probabilistic rounding error analysis", theorem 2.4): their root mean square is ERROR u sqrt(n). Two
                    runs that share no rounding differ by sqrt(2) times that. The tolerance is CONFIDENCE times the
                    difference, by Chebyshev's inequality enough for at least 8 of 9 values, and for the norm of a
                    tensor, to which all its elements contribute, for practically all.

The bound holds for sums that do not cancel. It grows with depth, up to MOST.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shardwise.parallel.program import Program
from shardwise.strategy import Strategy
from shardwise.workload.data import Share

SAFETY = 16.0
"""Factor of the tolerance over the expected growth of rounding errors."""

UNIT = 2.0**-8
"""Unit roundoff of bfloat16, u: the largest relative error of one rounding."""

ERROR = 0.42
"""Root mean square of the relative error of one rounding over u: uniform in the last place, with significands m whose
logarithms are uniform, sqrt(mean of 1 / m^2) / sqrt(3) = sqrt(0.541 / 3)."""

CONFIDENCE = 3.0
"""Factor of the tolerance over the root mean square of the error."""

ROUNDINGS = 6
"""Roundings in a row for each matrix, forward and backward. A block of a transformer has four matrices one after
another, and eleven operations each way: two norms, four products, attention, activation function, two sums, a cast."""

MOST = 0.25
"""Largest tolerance: a gradient that lacks a factor of two is off by a half, and must not pass."""


def rounding(program: Program, share: Share, *, float64: bool) -> float:
    """Return the relative error up to which two runs count as equal.

    That is SAFETY * eps * sqrt(summands) * sqrt(layers), and in bfloat16 CONFIDENCE * ERROR * UNIT * sqrt(2 roundings).

    Args:
        program: program that is compared with one worker.
        share: share of a step, whose batch gives the length of the sums.
        float64: True if both compute in double precision.
    """
    shapes = [held.layout.shape for held in program.engine.held.values()]
    layers = max(sum(len(shape) > 1 for shape in shapes) * program.strategy.pp, 1)
    if program.strategy.in_bf16(program.workload.precision):
        return min(MOST, CONFIDENCE * ERROR * UNIT * math.sqrt(2 * roundings(program.strategy, layers)))
    widest = max((max(shape, default=1) for shape in shapes), default=1)
    leaves = [leaf for m in share.microbatches for leaf in tree_leaves(m.data) if isinstance(leaf, Tensor)]
    positions = max((leaf.numel() for leaf in leaves), default=1) * program.strategy.replicas
    eps = torch.finfo(torch.float64 if float64 else torch.float32).eps
    return SAFETY * eps * math.sqrt(max(widest, positions)) * math.sqrt(layers)


def roundings(strategy: Strategy, matrices: int) -> int:
    """Return how often a value is rounded to bfloat16 in a row, in a model of so many matrices.

    Where workers sum in bfloat16, each one rounds its summand: those of `tp` for each matrix, and replicas with
    `reduce=bf16` once.
    """
    summed = strategy.tp if strategy.tp > 1 else 0
    return matrices * (ROUNDINGS + summed) + (strategy.replicas if strategy.reduce else 0)
