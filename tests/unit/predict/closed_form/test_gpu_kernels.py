"""Kernels on a GPU of the catalogue, by the analytic model."""

from __future__ import annotations

import pytest

from shardwise.cluster import catalogue
from shardwise.predict.hardware.constants import constants
from shardwise.predict.hardware.gpu import kernel_seconds, sustained
from shardwise.predict.profile.kernel import Kernel

CONVOLUTION = Kernel("aten.convolution", "convolution", "float32", 0.0, 4e8, (64, 256, 256, 784, 9))
MATMUL = Kernel("aten.mm", "matmul", "float32", 0.0, 4e8, (1, 64 * 784, 256, 256 * 9))


def test_convolutions_in_float32_run_on_tensor_cores_and_matmuls_do_not() -> None:
    h200 = catalogue.cluster("h200").nodes[0].device
    assert kernel_seconds(CONVOLUTION, h200) < 0.6 * kernel_seconds(MATMUL, h200)


def test_a_device_without_tf32_convolves_in_float32() -> None:
    v100 = catalogue.cluster("v100").nodes[0].device
    assert "tf32" not in v100.flops
    assert kernel_seconds(CONVOLUTION, v100) == kernel_seconds(MATMUL, v100)


def test_more_watts_sustain_a_larger_share_in_both_generations_of_blackwell() -> None:
    few, many = (sustained(catalogue.cluster(name).nodes[0].device, "bf16", constants()) for name in ("gb200", "gb300"))
    assert many / few == pytest.approx((1400 / 1200) ** constants().power_exponent)
