"""Kernels on a few numbers that the program runs beside the model: scaling of losses, gradient norm and report.

Their number depends on the engine alone. They take a step's time only where it is bound by launches.

    each loss          scaled by its weight, and 0 where the scale is 0; its gradient likewise     (`pipeline.executor`)
    each microbatch    its scale
    each step          total of the losses, gradient norm, report; clipping
"""

from __future__ import annotations

from shardwise.predict.profile.profile import Profile
from shardwise.splitting.schedule import FORWARD, WEIGHT
from shardwise.strategy import Strategy

BYTES = 24
"""Bytes that each of these kernels reads and writes, about."""

_OF_LOSS, _OF_ITS_GRADIENT = 5, 5
_OF_MODULE_LOSS = 3
_OF_STEP, _OF_NORM, _OF_CLIPPING = 4, 6, 6


def loss_kernels(strategy: Strategy, kind: str) -> int:
    """Count the small kernels in a pass of the last stage; `kind` is F, B, I or W, as in `splitting.schedule`."""
    if kind == WEIGHT:
        return 0
    if strategy.runs_module:
        return _OF_MODULE_LOSS if kind == FORWARD else 0
    return _OF_LOSS if kind == FORWARD else _OF_ITS_GRADIENT


def step_kernels(profile: Profile, strategy: Strategy) -> int:
    """Count the small kernels of a worker's step outside of its passes."""
    return strategy.microbatches + _OF_STEP + (_OF_NORM + _OF_CLIPPING if profile.clipped else 0)
