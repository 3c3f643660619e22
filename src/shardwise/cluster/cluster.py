"""Devices, nodes and links: what a prediction needs to know of the machines.

A cluster is made of nodes of devices. Links come in levels, innermost first: within a node (NVLink, PCIe, shared
memory), then between nodes, and further out where a network has more stages. A level spans so many devices; two
devices talk over the innermost level that spans both.

    Level("nvlink", span=8, ...), Level("infiniband", span=1024, ...)

Ranks fill nodes one after the other: rank r is device r % 8 of node r // 8 where nodes have eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["measured", "datasheet", "fitted", "assumed"]
"""Where a number comes from."""

ORIGINS: tuple[Origin, ...] = ("measured", "datasheet", "fitted", "assumed")

DTYPES = ("float64", "float32", "tf32", "bf16", "fp16", "fp8", "fp4")
"""Data types that a device may have a rate for, as this package spells them."""

SHAPES: Mapping[str, tuple[str, ...]] = {
    "matmul": ("batch", "m", "n", "k"),
    "attention": ("batch", "heads", "queries", "keys", "head size"),
    "convolution": ("batch", "channels in / groups", "channels out", "positions", "window size"),
    "memory": ("bytes",),
}
"""Kind of a kernel -> the sizes that its time is measured by."""


PROGRAMS = ("module", "sharded", "graph")
"""Kinds of program: of the module as it is (single, dp), with sharded parameters (fsdp), of a traced step (tp, pp)."""

OVERHEADS = ("step", "sharded", "stage", "exchange", "again", "selective", "crowded")
"""What hosts need time for beside kernels and messages, see `Device.overheads`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a curve.

    Attributes:
        shape: what was run, in the terms of the curve's kind.
        seconds: median of the repeats.
        spread: interquartile range of the repeats over their median.
    """

    shape: tuple[int, ...]
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class KernelCurve:
    """How long one kind of kernel takes on a device, by shape.

    Attributes:
        kind: one of SHAPES.
        dtype: one of DTYPES.
        samples: measured; a shape has the sizes that SHAPES names.
        operation: what was run, as in `predict.kernel.Kernel.operation`, for `memory`; `causal` or `dense` for
            attention; `native` for convolutions of one small sample, which torch computes on a CPU without oneDNN; else
            empty.
        backward: whether it is the backward pass of it.
        workers: how many workers of one host ran it at the same time.
        threads: of each of them.
    """

    kind: str
    dtype: str
    samples: tuple[Sample, ...]
    operation: str = ""
    backward: bool = False
    workers: int = 1
    threads: int = 1


@dataclass(frozen=True, slots=True)
class CollectiveCurve:
    """How long one collective takes, by bytes.

    Attributes:
        operation: as in `collective.Collective`.
        ranks: how many take part.
        nodes: over how many nodes they are spread.
        samples: measured; a shape is (bytes,), counted as in `collective.Collective`.
        groups: how many such groups communicated at the same time on the same nodes.
    """

    operation: str
    ranks: int
    nodes: int
    samples: tuple[Sample, ...]
    groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One processor.

    Attributes:
        name: of the model, as its maker spells it.
        kind: `gpu` or `cpu`.
        flops: dense floating point operations per second by dtype, without sparsity.
        memory_bytes: of its own memory.
        memory_bandwidth: bytes per second between the processor and its memory.
        cores: units that work is dealt to in whole tiles: SMs, compute units, CPU cores.
        launch_seconds: what the host needs to start one kernel from eager PyTorch; of a measured CPU what it needs
            beside the kernel: Python, modules, autograd.
        architecture: family, for example `hopper`.
        price_per_hour: in US dollars; None where it is not known.
        watts: board power limit, which bounds the rate that large products keep up; None where it is not known.
        curves: measured times of kernels; empty where nothing was measured.
        threads: of each worker; 0: the cores shared out evenly.
        shared: workers that share the device's cores -> how much slower each of them computes than one that has them
            all, measured.
        overlap: how much slower a device computes while it communicates, measured; 1: not at all.
        process: kind of program (see PROGRAMS) -> bytes of a worker's process beside its tensors, measured, where
            memory is that of the process.
        strain: how many times as long kernels take in a training as in calls of their own, measured: other tensors are
            in the caches there.
        heap: bytes of the process for each byte of tensors: what the allocator leaves unused, measured.
        overheads: seconds of the host beside kernels and messages, measured (see OVERHEADS): for each step, for each
            group of parameters that `fully_shard` looks after in a pass, for each pass through a stage of a graph, for
            each exchange of tensor parallelism, for each kernel that is computed again, once more for each kernel of
            a block that keeps the results of products, and for each step where workers outnumber cores.
        host_memory_bytes: of the memory of the host, this device's share; None where it is not known, and for a CPU.
        host_memory_bandwidth: bytes per second between the host's processors and that share of its memory.
        host_bandwidth: bytes per second between the device and the host's memory in one direction, while its neighbours
            use theirs.
        origins: attribute -> where it comes from.
        source: where the figures were read.
    """

    name: str
    kind: str
    flops: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth: float
    cores: int
    launch_seconds: float
    architecture: str = ""
    price_per_hour: float | None = None
    watts: float | None = None
    curves: tuple[KernelCurve, ...] = ()
    threads: int = 0
    shared: Mapping[int, float] = field(default_factory=dict)
    overlap: float = 1.0
    process: Mapping[str, int] = field(default_factory=dict)
    strain: float = 1.0
    heap: float = 1.0
    overheads: Mapping[str, float] = field(default_factory=dict)
    host_memory_bytes: int | None = None
    host_memory_bandwidth: float | None = None
    host_bandwidth: float | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Links of one kind.

    Attributes:
        name: for example `nvlink4`.
        span: how many devices one domain of such links joins.
        bandwidth: bytes per second of one device in one direction.
        latency: seconds of an empty message.
        origins: attribute -> where it comes from.
        source: where the figures were read.
    """

    name: str
    span: int
    bandwidth: float
    latency: float
    origins: Mapping[str, Origin] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of one kind: `count` of them with `devices` devices each."""

    device: Device
    devices: int
    count: int

    @property
    def size(self) -> int:
        """Devices in all of them."""
        return self.devices * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What there is to train on.

    Attributes:
        name: for people.
        nodes: kinds of nodes, in the order of the ranks.
        levels: links, innermost first; the outermost spans all devices.
        collectives: measured times of collectives; empty where nothing was measured.
        software: what it was measured with (torch version, backend), empty where nothing was.
    """

    name: str
    nodes: tuple[Nodes, ...]
    levels: tuple[Level, ...]
    collectives: tuple[CollectiveCurve, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of devices."""
        return sum(nodes.size for nodes in self.nodes)

    @property
    def node_size(self) -> int:
        """Devices of the smallest node: what a group of neighbours can count on."""
        return min(nodes.devices for nodes in self.nodes)

    @property
    def alike(self) -> bool:
        """Whether all devices are of one kind."""
        return len({id(nodes.device) for nodes in self.nodes}) == 1

    def device(self, rank: int) -> Device:
        """The device that a rank has.

        Raises:
            IndexError: there are not as many devices.
        """
        for nodes in self.nodes:
            if rank < nodes.size:
                return nodes.device
            rank -= nodes.size
        raise IndexError(f"rank {rank} of a cluster of {self.size} devices")
