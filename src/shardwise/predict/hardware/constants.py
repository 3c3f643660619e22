"""Constants of the cost model that no datasheet gives, fitted once to all published runs together.

The values are in `constants.json`. `python -m benchmarks.fit` writes that file, including how well the runs determine
each constant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Constants of the cost model: times in seconds, shares between 0 and 1.

    Attributes:
        sustained_default: share of the datasheet's rate that large matmuls sustain if power does not limit them. Used
            for float32 without tensor cores, and as the upper limit for GPU families not listed below.
        sustained_ampere: power-limited share for Ampere at the watts per FLOP/s of A100 SXM.
        sustained_hopper: power-limited share for Hopper and Ada at the watts per FLOP/s of H100 SXM.
        sustained_blackwell: power-limited share for Blackwell and Blackwell Ultra at the watts per FLOP/s of GB200.
        power_exponent: exponent with which the share grows with watts per FLOP/s among GPUs of one family.
        sustained_fp8: rate of fp8 matmuls divided by twice the sustained rate of bf16.
        sustained_fp4: rate of fp4 matmuls divided by four times the sustained rate of bf16.
        sustained_tf32: share of the datasheet's rate that tf32 matmuls sustain, relative to the share of bf16.
        tile_overhead: tile edge, in elements, at which the overhead equals the useful work: a tile of m x n runs at
            1 / (1 + tile_overhead (1/m + 1/n)) of the rate.
        prologue: cost of starting and ending a tile, in elements along k.
        partial_wave: cost of an almost empty last wave of tiles, relative to a full wave.
        memory_share: share of the datasheet's memory bandwidth that kernels reach.
        kernel_start: gap between the end of one kernel and the start of the next on a busy device.
        product_start: the same gap for matmuls, convolutions and attention, which also fill and drain their pipelines.
        attention_forward: share of the sustained rate that flash attention reaches at head size 128, forward pass.
        attention_backward: the same share for the backward pass.
        attention_softmax: cost of the softmax in elements of the head: with head size d, attention runs at
            1 / (1 + attention_softmax / d) of its rate, normalized to 1 at head size 128.
        attention_hopper: factor on the rate of flash attention 2 on Hopper and later, because it does not use their
            asynchronous matmuls.
        attention_fused: the same factor for cuDNN and flash attention 3.
        host_kernel: host time to launch one kernel of a layer, the layer's Python code included.
        host_collective: host time to launch one collective, stream synchronization included.
        link_share: share of the datasheet's bandwidth that a collective reaches within a node while it sends.
        link_copy: time for a rank to read, add and write its message in one pass of a ring within a node, relative to
            the time to send the whole message over its links.
        network_share: share of the datasheet's bandwidth between nodes, over networks whose adapters do the transport
            (InfiniBand, RoCE).
        hosted_share: the same share over networks whose transport runs on the host (Omni-Path, EFA, TCP).
        collective_start: fixed cost of any collective.
        link_hop: latency of one step of a ring within a node.
        network_hop: latency of one step of a ring between nodes.
        overlap_loss: compute seconds lost per second of communication that runs at the same time.
        allocator_slack: memory that PyTorch's caching allocator reserves beyond what is allocated, relative to the
            latter.
        context_bytes: GPU memory that CUDA and NCCL hold besides tensors in a job of many nodes.
    """

    sustained_default: float
    sustained_ampere: float
    sustained_hopper: float
    sustained_blackwell: float
    power_exponent: float
    sustained_fp8: float
    sustained_fp4: float
    sustained_tf32: float
    tile_overhead: float
    prologue: float
    partial_wave: float
    memory_share: float
    kernel_start: float
    product_start: float
    attention_forward: float
    attention_backward: float
    attention_softmax: float
    attention_hopper: float
    attention_fused: float
    host_kernel: float
    host_collective: float
    link_share: float
    link_copy: float
    network_share: float
    hosted_share: float
    collective_start: float
    link_hop: float
    network_hop: float
    overlap_loss: float
    allocator_slack: float
    context_bytes: float


@cache
def _file() -> Mapping[str, Any]:
    text = resources.files("shardwise.predict.hardware").joinpath("constants.json").read_text(encoding="utf-8")
    document: Mapping[str, Any] = json.loads(text)
    return document


def documented() -> Mapping[str, Mapping[str, Any]]:
    """Return name -> value, origin and source of each constant.

    A fitted constant also has `start`, its value before the fit, and the increase of the mean error over groups if the
    constant is 10% smaller (`rise_below`) or 10% larger (`rise_above`).
    """
    found: Mapping[str, Mapping[str, Any]] = _file()["constants"]
    return found


def fit_record() -> Mapping[str, Any]:
    """Return the record of the fit: its number of `rows` and its errors.

    `held_out` gives the error of each group of rows under constants that were fitted without that group.
    """
    found: Mapping[str, Any] = _file()["fit"]
    return found


def constants() -> Constants:
    """Return the constants that predictions use: those of the file, or within `using` others."""
    return _others[-1] if _others else _written()


@contextmanager
def using(numbers: Constants) -> Iterator[None]:
    """Let predictions use other constants for a while; what profiles remember of earlier ones has to be forgotten."""
    _others.append(numbers)
    try:
        yield
    finally:
        _others.pop()


_others: list[Constants] = []


@cache
def _written() -> Constants:
    return Constants(**{field.name: float(documented()[field.name]["value"]) for field in fields(Constants)})
