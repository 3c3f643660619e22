"""Range around the predicted step time in which a measured device is expected to keep nine of ten runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from shardwise.cluster.cluster import Device
from shardwise.options import NONE
from shardwise.strategy import Strategy

MODEL_ERROR = 0.15
"""Assumed relative error of nine of ten predictions for a machine on which equal steps take equal times."""


def relative_range(device: Device, strategy: Strategy) -> float:
    """Return the relative range around a predicted step: that of the model, and the scatter of equal steps.

    The scatter is the largest among the trainings of a calibration whose programs do what this strategy does.
    """
    scatter = max((device.spreads.get(name, 0.0) for name in _parts(device, strategy)), default=0.0)
    return math.hypot(MODEL_ERROR, scatter)


def _parts(device: Device, strategy: Strategy) -> Iterator[str]:
    """Yield the overheads (`cluster.OVERHEADS`) that a strategy's steps have on a device."""
    yield "step"
    if strategy.splits_parameters:
        yield "sharded"
    if not strategy.runs_module:
        yield "stage"
    if strategy.tp > 1:
        yield "exchange"
    if strategy.recompute != NONE:
        yield "again"
    if strategy.saves_products:
        yield "selective"
    if device.kind == "cpu" and strategy.workers > device.cores:
        yield "crowded"
