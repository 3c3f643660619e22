"""Overheads of a host: those with which small trainings were predicted are found again from their step times."""

from __future__ import annotations

import pytest

from shardwise.cluster.cluster import OVERHEADS, Cluster, Device, Level, Nodes
from shardwise.options import FULL, SELECTIVE
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.run.calibration import trials as calibration
from shardwise.run.calibration.trials import PLAIN, Footprint, FootprintTrial, small, usual
from shardwise.strategy import Strategy

HOST = Device(
    name="host",
    kind="cpu",
    flops={"float32": 1e11},
    memory_bytes=2**34,
    memory_bandwidth=5e10,
    cores=2,
    launch_seconds=3e-6,
    shared={2: 1.8},
)
LINKS = Level(name="host", span=4, bandwidth=4e9, latency=5e-5)
CLUSTER = Cluster(name="host", nodes=(Nodes(HOST, 4, 1),), levels=(LINKS,))

STRATEGIES = {
    PLAIN: Strategy(dp=2),
    "step": Strategy(dp=2),
    "sharded": Strategy(fsdp=2),
    "stage": Strategy(pp=2, microbatches=4),
    "exchange": Strategy(tp=2),
    "again": Strategy(dp=2, recompute=FULL),
    "selective": Strategy(dp=2, recompute=SELECTIVE),
    "crowded": Strategy(dp=4),
}
PLANTED = {
    "step": 1e-3,
    "sharded": 2e-3,
    "stage": 5e-4,
    "exchange": 3e-4,
    "again": 1e-4,
    "selective": 2e-4,
    "crowded": 4e-3,
}


def test_overheads_are_found_again_and_slower_kernels_are_none() -> None:
    planted = calibration._with_overheads(CLUSTER, PLANTED)
    trials = {}
    for name, strategy in STRATEGIES.items():
        model = (small if name == "step" else usual)(strategy.workers)
        step = simulate(profiles_on(model, planted), strategy, planted)
        longer = 0.0 if name == "step" else 0.1 * step.compute_seconds
        trials[name] = FootprintTrial(strategy, step.step_seconds + longer)
    found = Footprint({}, usual(2), trials[PLAIN], 0, trials).overheads(CLUSTER)
    assert found == pytest.approx(PLANTED, rel=0.02)


def test_every_overhead_is_planted() -> None:
    assert set(PLANTED) == set(OVERHEADS) == set(STRATEGIES) - {PLAIN}
