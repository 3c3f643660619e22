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
        sustained_default: share of the datasheet's rate that large matrix products keep up, limited by power: GPUs of
            other families than the following.
        sustained_ampere: the same for Ampere (A100, A10, RTX 30).
        sustained_hopper: for Hopper at 0.71 W per TFLOP/s (H100 SXM).
        sustained_blackwell: for Blackwell.
        sustained_narrow: how much of that share remains for fp8 and fp4, which need more power for operands per FLOP.
        sustained_single: the same for float32 on tensor cores (tf32) and for plain float32.
        tile_overhead: edge of a tile that costs as much as filling it, in elements: a tile of m x n runs at
            1 / (1 + tile_overhead (1/m + 1/n)) of the rate.
        prologue: length along k that starting and ending a tile costs, in elements.
        partial_wave: how much of a whole wave an almost empty last wave of tiles costs; 1: all of it.
        memory_share: share of the datasheet's memory bandwidth that kernels reach.
        kernel_start: from one kernel's end to the next one's beginning on a busy device.
        attention_forward: share of the sustained rate that flash attention reaches with heads of 128, forward.
        attention_backward: the same, backward.
        attention_softmax: exponentials per head element: with heads of d elements attention runs at
            1 / (1 + attention_softmax / d) of its rate, relative to 128.
        attention_hopper: share of its rate that flash attention 2 keeps on Hopper and later, whose asynchronous
            products it does not use.
        attention_fused: the same for cuDNN and flash attention 3, relative to the sustained rate.
        host_kernel: the host's time to launch one kernel of a layer, Python of the layer included.
        host_collective: the host's time to launch one collective, waiting for the streams included.
        link_share: share of the datasheet's bandwidth that a collective reaches within a node.
        network_share: the same between nodes.
        collective_start: of any collective.
        link_hop: per step of a ring within a node.
        network_hop: per step of a ring between nodes.
    """

    sustained_default: float
    sustained_ampere: float
    sustained_hopper: float
    sustained_blackwell: float
    sustained_narrow: float
    sustained_single: float
    tile_overhead: float
    prologue: float
    partial_wave: float
    memory_share: float
    kernel_start: float
    attention_forward: float
    attention_backward: float
    attention_softmax: float
    attention_hopper: float
    attention_fused: float
    host_kernel: float
    host_collective: float
    link_share: float
    network_share: float
    collective_start: float
    link_hop: float
    network_hop: float


@cache
def documented() -> Mapping[str, Mapping[str, Any]]:
    """The file of constants: name -> value, origin, and spread where it was fitted."""
    text = resources.files("shardwise.predict").joinpath("constants.json").read_text(encoding="utf-8")
    document: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return document


@cache
def constants() -> Constants:
    """The constants that predictions use."""
    return Constants(**{field.name: float(documented()[field.name]["value"]) for field in fields(Constants)})
