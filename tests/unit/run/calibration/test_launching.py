"""Host time of a kernel: that of a training step in the steady state, per launch of its passes."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch

from shardwise.cluster.cluster import Device, KernelCurve, Sample
from shardwise.cluster.measure import host_overhead
from shardwise.cluster.measure.host_overhead import WARM, timed_steps
from shardwise.predict.hardware.times import KernelTimes, launches
from shardwise.run.calibration import launching
from shardwise.run.calibration.launching import launch_seconds

CPU = torch.device("cpu")
GPU = Device(
    name="GPU",
    kind="gpu",
    flops={"float32": 1e12},
    memory_bytes=2**34,
    memory_bandwidth=1e12,
    cores=100,
    launch_seconds=0.0,
    curves=(KernelCurve("memory", "float32", (Sample((256,), 1e-6),), "aten.add"),),
)


def test_host_time_on_a_gpu_is_that_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of many parameters at once would count as some 80 us for each of its few kernels."""
    monkeypatch.setattr(launching, "timed_steps", lambda step, seconds, device: [0.009, 0.009, 0.9])
    kernels = launching._kernels(host_overhead.small_step(CPU))
    assert launches(kernels) > 100
    assert not any("_foreach" in kernel.operation for kernel in kernels)
    assert launch_seconds(GPU, CPU, 0.1) == pytest.approx(0.009 / launches(kernels))


def test_host_time_on_a_cpu_is_what_the_kernels_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "timed_steps", lambda step, seconds, device: [0.009])
    monkeypatch.setattr(KernelTimes, "seconds", lambda self, kernel: 1e-5)
    count = launches(launching._kernels(host_overhead.small_step(CPU)))
    found = launch_seconds(replace(GPU, kind="cpu", cores=1), CPU, 0.1)
    assert found == pytest.approx(0.009 / count - 1e-5)


def test_first_steps_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], itertools.count()

    def step() -> None:
        now[0] += 1.0 if next(calls) < WARM else 0.001  # libraries load their kernels in the first steps

    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    found = timed_steps(step, 0.02, CPU)
    assert len(found) >= 5
    assert found == pytest.approx([0.001] * len(found))
