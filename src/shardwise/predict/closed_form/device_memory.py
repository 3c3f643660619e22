"""Memory of a worker beside its tensors, and how many tensors fit beside it.

    process      on a CPU that was measured: the worker's process without tensors, and what its allocator leaves unused;
                 on a GPU that was measured: the workspaces that libraries keep
    fragments    on a GPU: memory that torch's caching allocator reserves and cannot use, a share of what it holds
    context      on a GPU: the CUDA context with its kernels, and one NCCL communicator for each axis of the strategy

A run on a GPU measures tensors and workspaces (`torch.cuda.max_memory_allocated`); it ends when all of these together
exceed the device. `allocator_slack` and `context_bytes` were fitted to jobs that report what `nvidia-smi` shows, with
tensor, pipeline and data parallel workers: three communicators. NVIDIA/nccl issue 864 reports 1.6 GB with one
communicator and 6 GB with three or more.
"""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster.cluster import Device
from shardwise.predict.hardware.constants import constants
from shardwise.predict.prediction import Memory
from shardwise.strategy import Strategy

CUDA_CONTEXT = 1 << 29
"""Bytes of the CUDA context and of the kernels that it loads, without communicators (assumed: 0.4 to 0.6 GiB)."""

FITTED_AXES = 3
"""Number of axes of the strategies to whose memory `context_bytes` was fitted."""


def in_process(memory: Memory, device: Device, strategy: Strategy) -> Memory:
    """Return the memory of a worker's tensors with that of its process, of fragments and of the context."""
    heap = round((device.heap - 1.0) * (memory.activations + memory.temporary))
    found = replace(memory, process=_process(device, strategy) + heap)
    fragments = round(_slack(device) * found.allocated)
    return replace(found, fragments=fragments, context=_context(device, strategy))


def at_least(tensors: float, device: Device, strategy: Strategy) -> float:
    """Return a lower bound of the bytes that a worker needs in total if its tensors need at least `tensors` bytes."""
    return (tensors + _process(device, strategy)) * (1 + _slack(device)) + _context(device, strategy)


def left_for_tensors(room: float, device: Device, strategy: Strategy) -> float:
    """Return the largest number of bytes of tensors with which a worker may fit into `room` bytes."""
    return (room - _context(device, strategy)) / (1 + _slack(device)) - _process(device, strategy)


def _process(device: Device, strategy: Strategy) -> int:
    """Return the measured bytes of the process of this kind of program; 0 if the device has no measurement of them."""
    plain = "sharded" if strategy.splits_parameters else "module"
    kind = plain if strategy.runs_module else "graph"
    own = device.process.get(kind, device.process.get("module", 0))
    if kind == "graph" and strategy.splits_parameters:
        own += max(0, device.process.get("sharded", 0) - device.process.get("module", 0))
    return own


def _slack(device: Device) -> float:
    """Return the bytes of fragments per byte that the allocator holds; 0 on a CPU, whose `heap` counts them."""
    return constants().allocator_slack if device.kind == "gpu" else 0.0


def _context(device: Device, strategy: Strategy) -> int:
    """Return the bytes of the CUDA context and of the communicators; 0 on a CPU."""
    if device.kind != "gpu":
        return 0
    axes = sum(degree > 1 for degree in (strategy.dp, strategy.fsdp, strategy.pp, strategy.tp))
    return round(CUDA_CONTEXT + axes * (constants().context_bytes - CUDA_CONTEXT) / FITTED_AXES)
