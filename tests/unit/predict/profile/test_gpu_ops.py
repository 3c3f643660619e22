"""Kernels are counted as a GPU runs them, though the model is looked at on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise import Workload
from shardwise.predict.profile.gpu_ops import on_gpu
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Layer
from shardwise.predict.profile.profiler import profile
from shardwise.predict.profile.segment_recorder import SegmentRecorder

aten = torch.ops.aten
ROWS, WIDTH = 6, 32


class Normalised(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(self.norm(x)).softmax(-1)
        return output


def layers(device: str, precision: str = "float32") -> list[Layer]:
    workload = Workload(
        name="normalised",
        model=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Normalised()),
        dataset=[{"x": torch.ones(WIDTH)}] * ROWS,
        inputs=lambda batch: batch["x"],
        loss=lambda output, batch: output.mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=ROWS,
        precision=precision,
    )
    return [segment.layer for segment in profile(workload, microbatch=ROWS, device=device).segments]


def of(layer: Layer, backward: bool) -> list[Kernel]:
    return [kernel for kernel in (layer.backward if backward else layer.forward).kernels if "norm" in kernel.operation]


def test_rms_norm_is_one_kernel_each_way() -> None:
    norm = layers("gpu")[1]
    size = 4 * ROWS * WIDTH
    (forward,), (backward,) = of(norm, False), of(norm, True)
    assert forward.operation == "aten._fused_rms_norm"
    assert forward.bytes == 2 * size + 4 * WIDTH + 4 * ROWS  # input, output; weight; one scale for each row
    assert backward.operation == "aten._fused_rms_norm_backward"
    assert backward.bytes == 3 * size + 2 * 4 * WIDTH + 4 * ROWS  # input and both gradients; weight and its gradient
    assert norm.inside == 4 * ROWS  # beside the input, which another link makes: the scales


def test_on_a_cpu_it_is_what_the_cpu_runs() -> None:
    norm = layers("cpu")[1]
    assert not of(norm, False)
    assert "aten.rsqrt" in {kernel.operation for kernel in norm.forward.kernels}


def dtypes(device: str, precision: str) -> dict[str, str]:
    return {kernel.operation: kernel.dtype for layer in layers(device, precision) for kernel in layer.forward.kernels}


def test_autocast_is_that_of_a_gpu_everywhere() -> None:
    for device in ("gpu", "cpu"):
        found = dtypes(device, "autocast")
        assert found["aten._softmax"] == "float32"
        assert found["aten.addmm"] == "bf16"
    assert dtypes("gpu", "autocast")["aten._fused_rms_norm"] == "float32"


def test_in_bf16_all_but_the_norms_of_a_cpu_is_bf16() -> None:
    found = {device: dtypes(device, "bf16") for device in ("gpu", "cpu")}
    assert found["gpu"]["aten._softmax"] == found["cpu"]["aten._softmax"] == "bf16"
    assert found["gpu"]["aten.addmm"] == found["cpu"]["aten.addmm"] == "bf16"
    assert found["gpu"]["aten._fused_rms_norm"] == "bf16"
    assert found["cpu"]["aten.rsqrt"] == "float32"


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_without_data(weighted: bool) -> None:
    with FakeTensorMode(), SegmentRecorder() as recorder:
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        weight = torch.empty(WIDTH, requires_grad=True) if weighted else None
        on_gpu(aten.rms_norm.default)(x, [WIDTH], weight).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert weight is None or (weight.grad is not None and weight.grad.shape == weight.shape)
    assert [k.operation for k in recorder.kernels if "norm" in k.operation] == [
        "aten._fused_rms_norm",
        "aten._fused_rms_norm_backward",
    ]


def test_equal_steps_have_equal_profiles() -> None:
    """A running mean that is gone must not be taken for what a batch norm saves, though both have one address."""

    def saved() -> list[int]:
        workload = Workload(
            name="batch norm",
            model=lambda: nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)),
            dataset=[{"x": torch.ones(6)}] * ROWS,
            inputs=lambda batch: batch["x"],
            loss=lambda output, batch: output.mean(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            batch_size=ROWS,
        )
        return [segment.layer.inside for segment in profile(workload, microbatch=ROWS).segments]

    assert len({tuple(saved()) for _ in range(30)}) == 1
