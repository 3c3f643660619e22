"""Which convolutions torch computes on a CPU with code of its own: that is much slower, and needs more memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from shardwise.cluster.curves import NATIVE
from shardwise.predict.profile.op_counter import workspace
from shardwise.predict.profile.segment_recorder import SegmentRecorder


def convolved(dimensions: int, batch: int, channels: int, side: int, window: int, groups: int = 1) -> tuple[Any, ...]:
    x = torch.randn(batch, channels, *[side] * dimensions)
    weight = torch.randn(8, channels // groups, *[window] * dimensions)
    where = [1] * dimensions, [window // 2] * dimensions, [1] * dimensions, False, [0] * dimensions, groups
    return x, weight, None, *where


CASES = [
    (2, 1, 4, 16, 3),
    (2, 2, 4, 16, 3),
    (2, 1, 32, 32, 3),
    (2, 1, 4, 16, 5),
    (2, 1, 4, 16, 3, 2),
    (3, 1, 4, 8, 3),
    (3, 2, 4, 8, 3),
    (3, 1, 64, 20, 3),
    (3, 1, 16, 16, 1),
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_is_what_torch_runs(case: tuple[int, ...]) -> None:
    arguments = convolved(*case)
    with profile(activities=[ProfilerActivity.CPU]) as ran:
        torch.ops.aten.convolution(*arguments)
    own = any("slow_conv" in event.key or "thnn_conv" in event.key for event in ran.key_averages())
    recorder = SegmentRecorder()
    with recorder:
        torch.ops.aten.convolution(*arguments)
    (kernel,) = recorder.take().kernels
    assert kernel.operation.startswith(NATIVE) == own
    assert (workspace(kernel) > 0) == (own and case[4] > 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_its_windows_take_memory_on_a_cpu(batch: int) -> None:
    x, weight, *rest = convolved(3, batch, 4, 8, 3)
    peaks = []
    for cpu in (True, False):
        with SegmentRecorder(cpu=cpu) as recorder:
            recorder.watch()
            torch.ops.aten.convolution_backward(torch.randn(batch, 8, 8, 8, 8), x, weight, [8], *rest[1:], [True] * 3)
        peaks.append(recorder.peak)
        (kernel,) = (each for each in recorder.kernels if each.kind == "convolution")
        assert kernel.backward
    windows = 4 * 4 * 8**3 * 27 if batch == 1 else 0
    assert peaks[0] - peaks[1] == windows
