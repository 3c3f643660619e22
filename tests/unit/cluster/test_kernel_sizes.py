"""KernelSizes of the kernels that are measured on a GPU: they can be computed, and reach those of real models."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.cluster.cluster import SHAPES
from shardwise.cluster.measure.arena import Arena
from shardwise.cluster.measure.kernel_cases import all_cases
from shardwise.cluster.measure.kernel_sizes import CPU, GPU
from shardwise.run.calibration.calibrate import QUICK, THOROUGH, note

CACHE_BYTES = 2**26
"""More than the caches of a GPU of 2024."""


@pytest.mark.parametrize("dtype", THOROUGH.dtypes)
def test_each_kind_of_kernel_can_be_computed_in_the_sizes_of_a_gpu(dtype: torch.dtype) -> None:
    few = replace(
        GPU,
        elements=(GPU.elements[0], GPU.elements[1], GPU.elements[-1]),  # every second one in bfloat16
        products=GPU.products[::40],
        convolutions=GPU.convolutions[::8],
        attentions=GPU.attentions[::4],
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        arena = Arena(torch.device("cpu"))
        noted = [note(case, arena) for case in all_cases(dtype, few)]
    assert {each.kind for each in noted} == set(SHAPES)
    assert max(each.shape[0] for each in noted if each.kind == "memory") > 4 * CACHE_BYTES


def test_matmuls_of_a_gpu_are_those_of_models_not_of_recipes() -> None:
    largest = {name: max(map(prod, sizes.products)) for name, sizes in (("cpu", CPU), ("gpu", GPU))}
    # 2^37 multiply-adds take 0.3 ms at 800 TFLOP/s; those of a CPU would be over before the next one is launched
    assert largest["cpu"] <= 2**27
    assert largest["gpu"] >= 2**37


def test_a_gpu_is_measured_in_all_dtypes_even_if_that_is_to_be_quick() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert len(QUICK.on(gpu)) == len(THOROUGH.on(gpu)) > len(list(all_cases(torch.float32, GPU)))
    assert len(QUICK.on(cpu)) == len(list(all_cases(torch.float32))) < len(THOROUGH.on(cpu))


def test_the_pool_of_a_gpu_is_larger_than_its_caches() -> None:
    assert Arena(torch.device("cuda"))._size > 4 * CACHE_BYTES > Arena(torch.device("cpu"))._size
