"""Devices, nodes and links: the description of the machines that a prediction reads.

A cluster is made of nodes of devices. Links come in levels, innermost first: within a node (NVLink, PCIe, shared
memory), then between nodes, and further out where a network has more stages. A level spans a number of devices; two
devices communicate over the innermost level that spans both.

    Level("nvlink", span=8, ...), Level("infiniband", span=1024, ...)

Ranks fill nodes one after the other: with eight devices per node, rank r is device r % 8 of node r // 8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from shardwise.errors import RequestError

Origin = Literal["measured", "datasheet", "fitted", "assumed"]
"""Provenance of a number."""

ORIGINS: tuple[Origin, ...] = ("measured", "datasheet", "fitted", "assumed")

DTYPES = ("float64", "float32", "tf32", "bf16", "fp16", "fp8", "fp4")
"""Data types that a device may have a rate for, as Shardwise spells them."""

SHAPES: Mapping[str, tuple[str, ...]] = {
    "matmul": ("batch", "m", "n", "k"),
    "attention": ("batch", "heads", "queries", "keys", "head size"),
    "convolution": ("batch", "channels in / groups", "channels out", "positions", "window size"),
    "memory": ("bytes",),
}
"""Map from the kind of a kernel to the sizes that make up its shape."""


PROGRAMS = ("module", "sharded", "graph")
"""Kinds of program: the unchanged module (single, dp), sharded parameters (fsdp), a traced graph (tp, pp)."""

LIBRARIES = ("transformers",)
"""Packages beside torch whose bytes in a process a calibration measures, if they are installed."""

OVERHEADS = ("step", "sharded", "stage", "exchange", "again", "selective", "crowded")
"""Host overheads beside kernels and messages, see `Device.overheads`."""


MARGIN = 0.05
"""Share of the usable memory that a plan leaves free unless the user says otherwise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a curve.

    Attributes:
        shape: sizes of the measured call, in the terms of the curve's kind.
        seconds: median of the repeats.
        spread: interquartile range of the repeats divided by their median.
    """

    shape: tuple[int, ...]
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class KernelCurve:
    """Measured seconds of one kind of kernel on a device, by shape.

    Attributes:
        kind: one of SHAPES.
        dtype: one of DTYPES.
        samples: measurements; a shape has the sizes that SHAPES names.
        operation: for `memory`, the operation as in `predict.profile.kernel.Kernel.operation`; for attention, `causal`
            or `dense`; for convolutions of one small sample, which torch computes on a CPU without oneDNN, `native`;
            else empty.
        backward: whether the backward pass of the operation was measured.
        workers: number of workers of one host that ran it at the same time.
        threads: number of threads of each of these workers.
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
    """Measured seconds of one collective, by bytes.

    Attributes:
        operation: as in `collective.Collective`.
        ranks: number of ranks that take part.
        nodes: number of nodes over which the ranks are spread.
        samples: measurements; a shape is (bytes,), counted as in `collective.Collective`.
        groups: number of such groups that communicated at the same time on the same nodes.
        level: name of the level of links that joined the ranks; empty if the number of nodes says it.
    """

    operation: str
    ranks: int
    nodes: int
    samples: tuple[Sample, ...]
    groups: int = 1
    level: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One processor: its datasheet figures, and its measured curves and overheads where it was calibrated.

    Attributes:
        name: model name as its maker spells it.
        kind: `gpu` or `cpu`.
        flops: dense floating point operations per second by dtype, without sparsity.
        memory_bytes: bytes of its own memory that a program can use; of a host's memory if workers share it.
        memory_bandwidth: bytes per second between the processor and its memory.
        cores: units that work is assigned to in whole tiles: SMs, compute units, CPU cores.
        launch_seconds: host time to start one kernel from eager PyTorch. For a measured CPU, host time beside the
            kernel: Python, modules, autograd.
        architecture: family, for example `hopper`.
        price_per_hour: price in US dollars per hour. None if it is not known.
        watts: board power limit, which bounds the sustained rate of large matmuls. None if it is not known.
        curves: measured times of kernels; empty if nothing was measured.
        threads: number of threads of each worker; 0 shares the cores evenly.
        shared: map from the number of workers that share the device's cores to the measured slowdown of each of them,
            compared with one worker that has all cores.
        overlap: measured slowdown of computation while the device communicates; 1 means none.
        process: map from the kind of program (see PROGRAMS) to the measured bytes of a worker's process beside its
            tensors; on a GPU, of the workspaces that libraries keep in its memory.
        libraries: map from a package that a model may import (see LIBRARIES) to its measured bytes in a process.
        strain: measured slowdown of kernels in a training compared with isolated calls: in a training, the caches hold
            other tensors.
        heap: measured bytes of the process per byte of tensors; above 1 because the allocator leaves memory unused.
        overheads: measured seconds of the host beside kernels and messages, by name (see OVERHEADS): `step` for each
            step; `sharded` for each gather and each scatter of `fully_shard`; `stage` for each pass
            through a stage of a graph; `exchange` for each exchange of tensor parallelism; `again` for each recomputed
            kernel; `selective`, in addition, for each kernel of a block that saves the results of matmuls; `crowded`
            for each step in which workers outnumber cores.
        spreads: measured spread (interquartile range divided by median) of the steps from which each overhead was
            determined.
        crowding: measured samples per second of a training by more workers than cores, as a multiple of those by as
            many workers as cores. None if it was not measured.
        reference_seconds: measured seconds of a step of the reference training (`run.calibration.reference`), which
            tells at any later time whether the machine is as fast as it was. None if it was not measured.
        reference_workers: number of its workers.
        host_memory_bytes: this device's share of the host's memory. None if it is not known, and for a CPU.
        host_memory_bandwidth: bytes per second between the host's processors and that share of its memory.
        host_bandwidth: bytes per second between the device and the host's memory in one direction, while the other
            devices of the host use theirs.
        origins: map from attribute to where it comes from.
        source: reference in which the figures were read.
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
    libraries: Mapping[str, int] = field(default_factory=dict)
    strain: float = 1.0
    heap: float = 1.0
    overheads: Mapping[str, float] = field(default_factory=dict)
    spreads: Mapping[str, float] = field(default_factory=dict)
    crowding: float | None = None
    reference_seconds: float | None = None
    reference_workers: int = 1
    host_memory_bytes: int | None = None
    host_memory_bandwidth: float | None = None
    host_bandwidth: float | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    source: str = ""

    @property
    def is_host(self) -> bool:
        """Return whether this is a whole host, whose workers share its cores and its memory: a measured CPU."""
        return self.kind == "cpu" and bool(self.shared or self.curves)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Links of one kind, and the number of devices that they join.

    Attributes:
        name: for example `nvlink4`.
        span: number of devices that one domain of such links joins.
        bandwidth: bytes per second of one device in one direction.
        latency: seconds of an empty message.
        origins: map from attribute to where it comes from.
        source: reference in which the figures were read.
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
        """Number of devices in all of these nodes."""
        return self.devices * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices to train on and the links between them.

    Attributes:
        name: name to show to users.
        nodes: kinds of nodes, in the order of the ranks.
        levels: links, innermost first; the outermost spans all devices.
        collectives: measured times of collectives; empty if nothing was measured.
        software: versions the cluster was measured with (torch version, backend); empty if nothing was measured.
        busy: cores of a host that other programs used, on average, while it was measured.
        margin: share of each device's memory that a strategy has to leave free.
    """

    name: str
    nodes: tuple[Nodes, ...]
    levels: tuple[Level, ...]
    collectives: tuple[CollectiveCurve, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)
    busy: float = 0.0
    margin: float = MARGIN

    @property
    def size(self) -> int:
        """Number of devices in the cluster."""
        return sum(nodes.size for nodes in self.nodes)

    @property
    def node_size(self) -> int:
        """Number of devices in the smallest node, so that a group of this many neighbours can share a node."""
        return min(nodes.devices for nodes in self.nodes)

    def importing(self, libraries: Collection[str]) -> Cluster:
        """Return the cluster with the processes of workers whose model imports `libraries` (see LIBRARIES)."""
        if not any(name in each.device.libraries for each in self.nodes for name in libraries):
            return self
        devices = {id(each.device): _importing(each.device, libraries) for each in self.nodes}
        return replace(self, nodes=tuple(replace(each, device=devices[id(each.device)]) for each in self.nodes))

    @property
    def worthwhile(self) -> int:
        """Number of devices to plan for: all, but of workers that share a host's cores only as many as pay.

        More workers than cores pay if they were faster than as many as cores by more than their steps scatter.
        """
        return sum(nodes.count * min(nodes.devices, _paying(nodes.device) or nodes.devices) for nodes in self.nodes)

    @property
    def homogeneous(self) -> bool:
        """Return whether all devices are of one kind."""
        return len({id(nodes.device) for nodes in self.nodes}) == 1

    def with_margin(self, margin: float | None) -> Cluster:
        """Return the cluster with another margin; None selects the default. Raises as `check_margin` does."""
        check_margin(margin)
        return replace(self, margin=MARGIN if margin is None else margin)

    def least_memory(self, workers: int) -> int:
        """Return the bytes that each of `workers` workers may need: on the smallest of the first devices."""
        firsts = accumulate((nodes.size for nodes in self.nodes), initial=0)
        used = [nodes for first, nodes in zip(firsts, self.nodes, strict=False) if first < workers]
        return min(self.memory_for_worker(nodes.device, min(workers, nodes.devices)) for nodes in used)

    def memory_for_worker(self, device: Device, workers: int) -> int:
        """Return the bytes that a worker on `device` may need if its node has `workers` of them: less by the margin."""
        sharing = workers if device.is_host else 1
        return int(device.memory_bytes * (1 - self.margin) / sharing)

    def device(self, rank: int) -> Device:
        """Return the device of a rank.

        Raises:
            IndexError: the cluster has no such rank.
        """
        for nodes in self.nodes:
            if rank < nodes.size:
                return nodes.device
            rank -= nodes.size
        raise IndexError(f"rank {rank} of a cluster of {self.size} devices")


def check_margin(margin: float | None) -> None:
    """Raise RequestError unless the margin is a share of the memory, from 0 to below 1, or None for the default."""
    if margin is not None and not 0 <= margin < 1:
        raise RequestError(f"margin={margin:g}: must be a share of the memory, 0 or more and below 1: 0.05 leaves 5%")


def _importing(device: Device, libraries: Collection[str]) -> Device:
    more = sum(size for name, size in device.libraries.items() if name in libraries)
    return replace(device, process={kind: size + more for kind, size in device.process.items()})


def _paying(device: Device) -> int:
    """Return the largest number of workers that pay on a measured CPU; 0 if there is no limit."""
    if device.kind != "cpu" or not device.curves:
        return 0
    pays = device.crowding is not None and device.crowding > 1.0 + device.spreads.get("crowded", 0.0)
    return 0 if pays else device.cores
