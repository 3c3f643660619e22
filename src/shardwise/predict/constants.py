"""What cannot be derived from datasheets: a few numbers, each named, fitted once for all published runs together.

The values lie in `constants.json`, which `python -m benchmarks.fit` writes together with how well each is determined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Numbers of the cost model. Times in seconds, shares between 0 and 1.

    Attributes:
        sustained_default: share of the datasheet's rate that large matrix products keep up where power does not limit
            them: float32 without tensor cores, and at most GPUs of other families than the following.
        sustained_ampere: the same, limited by power, for Ampere at the watts per FLOP/s of A100 SXM.
        sustained_hopper: the same for Hopper and Ada at the watts per FLOP/s of H100 SXM.
        sustained_blackwell: the same for Blackwell at the watts per FLOP/s of GB200.
        sustained_ultra: the same for Blackwell Ultra at the watts per FLOP/s of GB300.
        power_exponent: how that share grows with watts per FLOP/s among GPUs of one family.
        sustained_fp8: rate of fp8 products over twice the sustained rate of bf16.
        sustained_fp4: rate of fp4 products over four times the sustained rate of bf16.
        idle_boost: power of the share of a step in which a GPU computes, by which its products take less time: what it
            does not draw while it waits it may draw then.
        sustained_tf32: rate of tf32 products over the datasheet's, relative to bf16.
        tile_overhead: edge of a tile that costs as much as filling it, in elements: a tile of m x n runs at
            1 / (1 + tile_overhead (1/m + 1/n)) of the rate.
        prologue: length along k that starting and ending a tile costs, in elements.
        partial_wave: how much of a whole wave an almost empty last wave of tiles costs; 1: all of it.
        memory_share: share of the datasheet's memory bandwidth that kernels reach.
        kernel_start: from one kernel's end to the next one's beginning on a busy device.
        product_start: the same of products, convolutions and attention, which fill and drain their pipelines besides.
        attention_forward: share of the sustained rate that flash attention reaches with heads of 128, forward.
        attention_backward: the same, backward.
        attention_softmax: exponentials per head element: with heads of d elements attention runs at
            1 / (1 + attention_softmax / d) of its rate, relative to 128.
        attention_hopper: share of its rate that flash attention 2 keeps on Hopper and later, whose asynchronous
            products it does not use.
        attention_fused: the same for cuDNN and flash attention 3, relative to the sustained rate.
        host_kernel: the host's time to launch one kernel of a layer, Python of the layer included.
        host_message: the host's time for one message between stages of a pipeline.
        host_collective: the host's time to launch one collective, waiting for the streams included.
        link_share: share of the datasheet's bandwidth that a collective reaches within a node while it sends.
        link_copy: what a rank needs beside to read, add and write its message in one pass of a ring within a node,
            relative to sending all of it over its links.
        network_share: the same between nodes, over networks whose adapters do the transport (InfiniBand, RoCE).
        hosted_share: the same over networks whose transport runs on the host (Omni-Path, EFA, TCP).
        collective_start: of any collective.
        link_hop: per step of a ring within a node.
        network_hop: per step of a ring between nodes.
        overlap_loss: seconds that computation loses per second of communication that runs at the same time.
        allocator_slack: what PyTorch's allocator reserves beyond what is allocated, relative.
        context_bytes: what CUDA and NCCL hold of a GPU's memory besides, in a job of many nodes.
    """

    sustained_default: float
    sustained_ampere: float
    sustained_hopper: float
    sustained_blackwell: float
    sustained_ultra: float
    power_exponent: float
    sustained_fp8: float
    sustained_fp4: float
    sustained_tf32: float
    idle_boost: float
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
    host_message: float
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
    text = resources.files("shardwise.predict").joinpath("constants.json").read_text(encoding="utf-8")
    document: Mapping[str, Any] = json.loads(text)
    return document


def documented() -> Mapping[str, Mapping[str, Any]]:
    """Name -> value, origin, source.

    Where it was fitted also `start`, its value before the fit, and by how much the mean error over groups rises with a
    tenth less (`rise_below`) and a tenth more (`rise_above`) of it.
    """
    found: Mapping[str, Mapping[str, Any]] = _file()["constants"]
    return found


def fit_record() -> Mapping[str, Any]:
    """What was fitted to how many rows, and the error by group with constants fitted without it (`held_out`)."""
    found: Mapping[str, Any] = _file()["fit"]
    return found


@cache
def constants() -> Constants:
    """The constants that predictions use."""
    return Constants(**{field.name: float(documented()[field.name]["value"]) for field in fields(Constants)})
