"""The range of a prediction grows with the scatter of the trainings that are like it."""

from __future__ import annotations

import math

import pytest

from shardwise.cluster.cluster import Device
from shardwise.predict.hardware.scatter import MODEL_ERROR, relative_range
from shardwise.strategy import Strategy

SPREADS = {"step": 0.05, "sharded": 0.1, "stage": 0.2, "exchange": 0.3, "again": 0.4, "selective": 0.5, "crowded": 0.6}


def device(spreads: dict[str, float]) -> Device:
    return Device(
        name="Box",
        kind="cpu",
        flops={"float32": 1e9},
        memory_bytes=2**34,
        memory_bandwidth=1e10,
        cores=2,
        launch_seconds=1e-6,
        spreads=spreads,
    )


@pytest.mark.parametrize(
    ("strategy", "scatter"),
    [
        ("single", 0.05),
        ("dp=2", 0.05),
        ("fsdp=2", 0.1),
        ("fsdp=2,zero=1", 0.05),
        ("pp=2", 0.2),
        ("tp=2", 0.3),
        ("dp=2,recompute=full", 0.4),
        ("dp=2,recompute=selective", 0.5),
        ("dp=4", 0.6),
        ("fsdp=2,pp=2", 0.6),
    ],
)
def test_the_range_is_that_of_what_a_strategy_does(strategy: str, scatter: float) -> None:
    found = relative_range(device(SPREADS), Strategy.parse(strategy))
    assert found == pytest.approx(math.hypot(MODEL_ERROR, scatter))


def test_a_device_that_was_not_measured_has_the_range_of_the_model() -> None:
    assert relative_range(device({}), Strategy.parse("tp=2")) == MODEL_ERROR
