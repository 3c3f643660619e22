"""Elementwise operations on short rows are noted as such, and timed by curves of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardwise.cluster.cluster import KernelCurve, Sample
from shardwise.cluster.curves import Curves
from shardwise.cluster.measure.arena import Arena
from shardwise.cluster.measure.kernel_cases import _in_rows
from shardwise.predict.profile.op_counter import kernel_of
from shardwise.predict.profile.segment_recorder import SegmentRecorder
from shardwise.run.calibration.calibrate import note

HEADS = torch.randn(4, 8, 4, 32).transpose(1, 2)
HALF = HEADS.chunk(2, -1)[0]  # rows of 16
WIDE = torch.randn(64, 128)
TABLE, BIAS = torch.randn(8, 16), torch.randn(128)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: HALF * TABLE, "rows aten.mul"),
        (lambda: HALF.neg(), "rows aten.neg"),
        (lambda: WIDE * WIDE, "aten.mul"),
        (lambda: WIDE + BIAS, "aten.add"),
        (lambda: WIDE * 2.0, "aten.mul"),
        (lambda: WIDE.t() + WIDE.t(), "aten.add"),  # the same order in memory
        (lambda: HALF.contiguous(), "aten.clone"),
        (lambda: WIDE.sum(0), "aten.sum"),
    ],
)
def test_noted(call: Callable[[], Tensor], name: str) -> None:
    recorder = SegmentRecorder()
    with recorder:
        call()
    assert [kernel.operation for kernel in recorder.take().kernels] == [name]


def test_a_change_in_place_of_a_list_of_tensors_writes_the_list() -> None:
    first, second = [torch.zeros(64), torch.zeros(32)], [torch.ones(64), torch.ones(32)]
    recorder = SegmentRecorder()
    with recorder:
        torch._foreach_mul_(first, 2.0)
        torch._foreach_lerp_(first, second, 0.5)
    assert [kernel.bytes for kernel in recorder.take().kernels] == [2 * 4 * 96, 3 * 4 * 96]


def test_a_shard_is_copied_into_its_part_of_what_is_gathered() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives  # registers the operation

    assert _fsdp_collectives
    recorder = SegmentRecorder()
    with recorder:
        torch.ops.fsdp.all_gather_copy_in([torch.ones(16)], torch.empty(64), [16], 16, 1)
    kernels = [each for each in recorder.take().kernels if each.operation == "fsdp.all_gather_copy_in"]
    assert [kernel.bytes for kernel in kernels] == [2 * 4 * 16]


def test_what_is_measured_is_noted_as_rows() -> None:
    arena = Arena(torch.device("cpu"), size=2**22)
    found = {note(case, arena).operation for case in _in_rows(4096, torch.float32)}
    assert found == {"rows aten.mul", "rows aten.add", "rows aten.neg"}


def test_timed() -> None:
    def curve(operation: str, seconds: float) -> KernelCurve:
        return KernelCurve("memory", "float32", (Sample((1000,), seconds),), operation)

    plain = [curve("aten.add", 1.0), curve("aten.gelu", 2.0)]
    curves = Curves([*plain, curve("rows aten.add", 3.0), curve("rows aten.mul", 4.0)], 1, 1)
    assert curves.moved("rows aten.mul_", "float32", 1000) == 4.0
    assert curves.moved("rows aten.gelu", "float32", 1000) == 3.0  # as rows are added
    assert curves.moved("aten.gelu", "float32", 1000) == 2.0
    assert Curves(plain, 1, 1).moved("rows aten.gelu", "float32", 1000) == 2.0  # of a file without rows


def test_experts_count_the_rows_that_they_get() -> None:
    """16 tokens that go to 2 of 4 experts each are 32 rows, whatever expert they meet."""
    rows, experts = torch.empty(32, 8, device="meta"), torch.empty(4, 8, 24, device="meta")
    result, offsets = torch.empty(32, 24, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    product = 2 * 32 * 8 * 24
    forward = kernel_of(torch.ops.aten._grouped_mm.default, (rows, experts, offsets), {}, result, "forward")
    weights = kernel_of(torch.ops.aten._grouped_mm.default, (rows.T, result, offsets), {}, experts, "backward")
    assert forward is not None
    assert weights is not None
    assert (forward.kind, forward.flops, forward.shape) == ("matmul", product, (4, 8, 24, 8))
    assert (weights.kind, weights.flops) == ("matmul", product)


def test_the_experts_of_transformers_count_too() -> None:
    pytest.importorskip("transformers.integrations.moe")
    rows, experts = torch.empty(32, 8, device="meta"), torch.empty(4, 8, 24, device="meta")
    result, offsets = torch.empty(32, 24, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    names = torch.ops.transformers
    forward = kernel_of(names.grouped_mm_fallback.default, (rows, experts, offsets), {}, result, "forward")
    arguments, gradients = (rows, experts, offsets, result), (rows, experts)
    backward = kernel_of(names.grouped_mm_fallback_backward.default, arguments, {}, gradients, "backward")
    assert forward is not None
    assert backward is not None
    assert forward.flops == 2 * 32 * 8 * 24
    assert backward.flops == 2 * forward.flops, "of the rows, and of the weights"
