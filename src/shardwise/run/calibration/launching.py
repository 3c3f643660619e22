"""Measure the host time for each kernel of a training step in the steady state."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from shardwise.cluster.cluster import Device
from shardwise.cluster.measure.host_overhead import small_step, timed_steps
from shardwise.predict.hardware.times import KernelTimes, launches
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.segment_recorder import SegmentRecorder


def launch_seconds(device: Device, where: torch.device, seconds: float) -> float:
    """Return the host seconds per kernel: to launch it on a GPU, and in addition to the kernel itself on a CPU.

    They are those of forward and backward passes, to which predictions apply them. An update has few kernels for many
    parameters where it treats all of them at once, and its host time is a part of the overhead of each step.

    Args:
        device: the device with its measured curves.
        where: the torch device to measure on.
        seconds: time to spend.
    """
    threads = min(curve.threads for curve in device.curves if curve.workers == 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step = small_step(where)
    kernels = _kernels(step)
    took = statistics.median(timed_steps(step, seconds, where))
    torch.set_num_threads(before)
    busy = 0.0
    if device.kind == "cpu":
        times = KernelTimes(replace(device, threads=threads), 1)
        busy = sum(times.seconds(kernel) for kernel in kernels)
    return max(0.0, took - busy) / launches(kernels)


def _kernels(step: Callable[[], None]) -> tuple[Kernel, ...]:
    step()
    recorder = SegmentRecorder()
    with recorder:
        step()
    return recorder.take().kernels
