"""Range in which a step time is expected, from what was measured and from the errors of earlier predictions.

    datasheet    error that nine in ten predictions of published runs keep, by the axes that communicate
    measured     scatter of equal steps while the machine was measured, or spread of the repeats behind the curves, if
                 that is larger; and error that nine in ten predictions of trainings on measured machines keep; both are
                 independent, so that their squares add up

Two strategies on one cluster run on the same devices and links, so most of these errors they have in common. What is
left is the error of their difference, which has a table of its own: `difference_error`.

The errors are in `errors.json`, which `python -m benchmarks.errors` writes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from importlib import resources
from math import hypot
from typing import Any

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve
from shardwise.options import NONE
from shardwise.predict.profile.memo import Same
from shardwise.strategy import Strategy

NINE_IN_TEN = 1.22
"""Half of the range of nine in ten values, in interquartile ranges: 1.645 / 1.349 for a normal distribution."""


def kind_of(tp: int, pp: int) -> str:
    """Return the kind of a strategy for its errors: its axis that is hardest to predict."""
    return "pipeline" if pp > 1 else "tensor" if tp > 1 else "data"


def kind_of_difference(one: Strategy, other: Strategy) -> str:
    """Return the kind of the difference of two strategies: of axes with other degrees, the hardest to predict.

    `data` are also strategies that differ in options alone, such as microbatches and recomputation.
    """
    return "pipeline" if one.pp != other.pp else "tensor" if one.tp != other.tp else "data"


def difference_error(one: Strategy, other: Strategy) -> float:
    """Return the relative error of the difference of two predicted step times that one in three such pairs keep.

    The error of a difference is that of the ratio of the two step times, on the same cluster and batch. At a predicted
    difference of this size two in three pairs err by more: half of these in favour of the slower strategy. So the
    strategy that is predicted faster is really faster in two of three cases.
    """
    return float(_table()["differences"][kind_of_difference(one, other)]["error"])


def relative_error(cluster: Cluster, device: Device, strategy: Strategy, communicating: float) -> float | None:
    """Return the relative error that nine in ten predictions keep.

    Args:
        cluster: the cluster.
        device: the device that the prediction is for.
        strategy: the strategy.
        communicating: share of the step for which the device waits for communication.

    Returns:
        The error; None for a CPU that was not measured, because no such run was published.
    """
    if device.curves:
        kernels, collectives = _spreads(Same(cluster), Same(device))
        spread = NINE_IN_TEN * ((1 - communicating) * kernels + communicating * collectives)
        scatter = max((device.spreads.get(name, 0.0) for name in _parts(device, strategy)), default=0.0)
        return hypot(max(spread, scatter), errors()["measured"])
    return errors()[kind_of(strategy.tp, strategy.pp)] if device.kind == "gpu" else None


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


def errors() -> Mapping[str, float]:
    """Return the map from a kind of prediction to its relative error."""
    found: Mapping[str, float] = _table()["errors"]
    return found


@cache
def _table() -> Any:
    text = resources.files("shardwise.predict.hardware").joinpath("errors.json").read_text(encoding="utf-8")
    return json.loads(text)


@lru_cache(maxsize=64)
def _spreads(cluster: Same[Cluster], device: Same[Device]) -> tuple[float, float]:
    """Return the median spread of the kernels of a device, and of the collectives of its cluster."""
    return _median(device.value.curves), _median(cluster.value.collectives)


def _median(curves: Iterable[KernelCurve | CollectiveCurve]) -> float:
    return statistics.median([sample.spread for curve in curves for sample in curve.samples] or [0.0])
