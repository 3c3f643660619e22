"""Read clusters from TOML: the file format of a cluster, and of the catalogue's devices and links.

    name = "two boxes"                  # name to show to users

    [devices.box]                       # devices, by a name of your own
    name = "NVIDIA A100 SXM4 80GB"
    ...                                 # see DEVICE for fields and units

    [[nodes]]                           # kinds of nodes, in the order of the ranks
    device = "box"
    devices = 8
    count = 2

    [[levels]]                          # links, innermost first; the outermost spans all devices
    name = "nvlink3"
    span = 8                            # devices that one domain of such links joins
    bandwidth = 300e9                   # bytes per second of one device in one direction
    latency = 2e-6                      # seconds of an empty message

Measurements are stored as rows: a sample of a curve is `[sizes ..., seconds, spread]`; see `cluster.SHAPES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.cluster.cluster import (
    DTYPES,
    LIBRARIES,
    ORIGINS,
    OVERHEADS,
    PROGRAMS,
    SHAPES,
    Cluster,
    CollectiveCurve,
    Device,
    KernelCurve,
    Level,
    Nodes,
    Sample,
)
from shardwise.cluster.toml_fields import (
    Field,
    Flag,
    NestedTable,
    Number,
    Text,
    Where,
    read_field,
    read_mapping,
    read_table,
    show,
)
from shardwise.collective import OPERATIONS
from shardwise.errors import ClusterError
from shardwise.options import MOST
from shardwise.tomlfile import read_toml
from shardwise.units import parse_whole

LARGEST = 16 << 20
"""Largest size of a cluster file in bytes; a thorough calibration has half a megabyte."""

PRICE = Number("US dollars per hour", least=0, default=None)
SOURCE = Text("where the figures were read", default="")
ORIGIN = Text("where a number comes from", choices=ORIGINS)
ORIGINS_TABLE = NestedTable("a table of field = origin", default={})

DEVICE: dict[str, Field] = {
    "name": Text("of the model, as its maker spells it"),
    "kind": Text("kind", choices=("gpu", "cpu")),
    "architecture": Text("family", default=""),
    "memory_bytes": Number("bytes", whole=True),
    "memory_bandwidth": Number("bytes per second"),
    "cores": Number("SMs, compute units or CPU cores", whole=True),
    "launch_seconds": Number("seconds to start one kernel", least=0),
    "price_per_hour": PRICE,
    "watts": Number("watts of the board's power limit", default=None),
    "host_memory_bytes": Number("bytes of the host's memory for each device", whole=True, default=None),
    "host_memory_bandwidth": Number("bytes per second of the host's memory for each device", default=None),
    "host_bandwidth": Number("bytes per second between device and host in one direction", default=None),
    "overlap": Number("times slower while communicating", least=1, default=1.0),
    "strain": Number("times as long in a training", default=1.0),
    "heap": Number("bytes of the process for each byte of tensors", least=1, default=1.0),
    "process": NestedTable("a table of program = bytes", default={}),
    "libraries": NestedTable("a table of package = bytes", default={}),
    "overheads": NestedTable("a table of what = seconds", default={}),
    "spreads": NestedTable("a table of what = share of the median", default={}),
    "crowding": Number("times the samples per second of as many workers as cores", default=None),
    "reference_seconds": Number("seconds of a step of the reference training", default=None),
    "reference_workers": Number("workers of the reference training", whole=True, default=1),
    "threads": Number("threads of each worker; 0: the cores shared out evenly", least=0, whole=True, default=0),
    "flops": NestedTable("a table of dtype = dense operations per second"),
    "shared": NestedTable("a table of workers = times slower", default={}),
    "curves": NestedTable("an array of tables", kind=list, default=[]),
    "origins": ORIGINS_TABLE,
    "source": SOURCE,
}

LEVEL: dict[str, Field] = {
    "name": Text("of the links"),
    "span": Number("devices that one domain joins", whole=True),
    "bandwidth": Number("bytes per second of one device in one direction"),
    "latency": Number("seconds of an empty message", least=0),
    "origins": ORIGINS_TABLE,
    "source": SOURCE,
}

NODES: dict[str, Field] = {
    "device": Text("name of one of the file's devices"),
    "devices": Number("devices in a node", whole=True),
    "count": Number("nodes", whole=True),
}

KERNEL_CURVE: dict[str, Field] = {
    "kind": Text("of the kernels", choices=tuple(SHAPES)),
    "operation": Text("what was run", default=""),
    "dtype": Text("dtype", choices=DTYPES),
    "backward": Flag(default=False),
    "workers": Number("workers of one host at the same time", whole=True, default=1),
    "threads": Number("threads of each worker", whole=True, default=1),
    "samples": NestedTable("rows of [sizes ..., seconds, spread]", kind=list),
}

COLLECTIVE_CURVE: dict[str, Field] = {
    "operation": Text("operation", choices=OPERATIONS),
    "ranks": Number("ranks that take part", whole=True),
    "nodes": Number("nodes that they are spread over", whole=True),
    "groups": Number("such groups at the same time", whole=True, default=1),
    "level": Text("of links that joined them", default=""),
    "samples": NestedTable("rows of [bytes, seconds, spread]", kind=list),
}

CLUSTER: dict[str, Field] = {
    "name": Text("for people"),
    "devices": NestedTable("a table of devices by name"),
    "nodes": NestedTable("an array of tables", kind=list),
    "levels": NestedTable("an array of tables", kind=list, default=[]),
    "collectives": NestedTable("an array of tables", kind=list, default=[]),
    "software": NestedTable("a table of texts", default={}),
    "busy": Number("cores of a host that others used meanwhile", least=0, default=0.0),
}

PROCESS = Number("bytes of a worker's process beside its tensors", least=0, whole=True)
OVERHEAD = Number("seconds of the host", least=0)
RATE = Number("dense operations per second")
SLOWER = Number("times slower", least=0)
SHAPE = Number("a size", whole=True, least=0)
SECONDS = Number("seconds")
SPREAD = Number("share of the median", least=0)


def read_cluster(path: Path | str) -> Cluster:
    """Read the cluster that a TOML file describes.

    Raises:
        ClusterError: the file cannot be read, is not TOML, or has a missing, wrong or unknown field; the message names
            the file, the key and the unit.
    """
    return parse_cluster(load_toml(Path(path)), str(path))


def load_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises ClusterError if it cannot be read."""
    return read_toml(path, LARGEST, ClusterError, "")


def parse_cluster(content: dict[str, Any], file: str) -> Cluster:
    """Build a cluster from the content of a file; `file` is its name in messages. Raises ClusterError."""
    where = Where(file)
    values = read_table(content, CLUSTER, where)
    devices = {name: parse_device(table, where / "devices" / name) for name, table in values["devices"].items()}
    nodes = tuple(_nodes(table, devices, (where / "nodes").item(i)) for i, table in enumerate(values["nodes"]))
    levels = tuple(parse_level(table, (where / "levels").item(i)) for i, table in enumerate(values["levels"]))
    collectives = tuple(
        _collective_curve(table, (where / "collectives").item(i)) for i, table in enumerate(values["collectives"])
    )
    software = {
        name: read_field(values["software"], name, Text("a version"), where / "software") for name in values["software"]
    }
    cluster = Cluster(
        name=values["name"],
        nodes=nodes,
        levels=levels,
        collectives=collectives,
        software=software,
        busy=values["busy"],
    )
    _check(cluster, where)
    return cluster


def _check(cluster: Cluster, where: Where) -> None:
    """Check what involves several tables: a node exists, and the links' spans ascend and reach all devices."""
    if not cluster.nodes:
        raise (where / "nodes").error("is empty: there must be one kind of nodes at least")
    if cluster.size > 1 and not cluster.levels:
        raise (where / "levels").error(f"is empty: {cluster.size} devices need links between them")
    if cluster.size > MOST:
        raise (where / "nodes").error(f"have {cluster.size} devices: at most {MOST} can be planned for")
    spans = [level.span for level in cluster.levels]
    if any(inner >= outer for inner, outer in itertools.pairwise(spans)):
        raise (where / "levels").error(f"have spans {spans} (devices): must ascend, the innermost first")
    if spans and spans[-1] < cluster.size:
        outermost = (where / "levels").item(len(spans) - 1) / "span"
        raise outermost.error(f"= {spans[-1]}: the outermost must span all {cluster.size} devices")


def parse_device(table: Any, where: Where) -> Device:
    """Build one device from its table. Raises ClusterError."""
    values = read_table(table, DEVICE, where)
    curves = tuple(_kernel_curve(curve, (where / "curves").item(i)) for i, curve in enumerate(values.pop("curves")))
    flops = read_mapping(values.pop("flops"), RATE, where / "flops", DTYPES, "dtypes")
    process = read_mapping(values.pop("process"), PROCESS, where / "process", PROGRAMS, "programs")
    libraries = read_mapping(values.pop("libraries"), PROCESS, where / "libraries", LIBRARIES, "packages")
    overheads = read_mapping(values.pop("overheads"), OVERHEAD, where / "overheads", OVERHEADS, "overheads")
    spreads = read_mapping(values.pop("spreads"), SPREAD, where / "spreads", OVERHEADS, "overheads")
    if not flops:
        raise (where / "flops").error("is empty: one dtype at least must have a rate (dense operations per second)")
    return Device(
        **{**values, "origins": read_origins(values["origins"], DEVICE, where), "shared": _shared(values, where)},
        flops=flops,
        process=process,
        libraries=libraries,
        overheads=overheads,
        spreads=spreads,
        curves=curves,
    )


def parse_level(table: Any, where: Where) -> Level:
    """Build one level of links from its table. Raises ClusterError."""
    values = read_table(table, LEVEL, where)
    return Level(**{**values, "origins": read_origins(values["origins"], LEVEL, where)})


def read_origins(table: Any, fields: Mapping[str, Field], where: Where) -> dict[str, Any]:
    """Return the map from field to origin. Raises ClusterError if a field or an origin is unknown."""
    known = tuple(name for name in fields if name not in ("name", "kind", "origins", "source"))
    return read_mapping(table, ORIGIN, where / "origins", known, "fields")


def _shared(values: Mapping[str, Any], where: Where) -> dict[int, float]:
    shared = values["shared"]
    for workers in shared:
        if not _is_count(workers):
            raise (where / "shared" / workers).error("is not a number of workers")
    return {int(workers): read_field(shared, workers, SLOWER, where / "shared") for workers in shared}


def _is_count(text: str) -> bool:
    try:
        return parse_whole(text, MOST) >= 1
    except ValueError:
        return False


def _nodes(table: Any, devices: Mapping[str, Device], where: Where) -> Nodes:
    fields = {**NODES, "device": Text("", choices=tuple(devices))}
    values = read_table(table, fields, where)
    return Nodes(devices[values["device"]], values["devices"], values["count"])


def _kernel_curve(table: Any, where: Where) -> KernelCurve:
    values = read_table(table, KERNEL_CURVE, where)
    samples = _samples(values["samples"], SHAPES[values["kind"]], where / "samples")
    return KernelCurve(**{**values, "samples": samples})


def _collective_curve(table: Any, where: Where) -> CollectiveCurve:
    values = read_table(table, COLLECTIVE_CURVE, where)
    return CollectiveCurve(**{**values, "samples": _samples(values["samples"], ("bytes",), where / "samples")})


def _samples(rows: list[Any], sizes: tuple[str, ...], where: Where) -> tuple[Sample, ...]:
    return tuple(_sample(row, sizes, where.item(i)) for i, row in enumerate(rows))


def _sample(row: Any, sizes: tuple[str, ...], where: Where) -> Sample:
    if not isinstance(row, list) or len(row) != len(sizes) + 2:
        raise where.error(f"= {show(row)}: must be a row of [{', '.join(sizes)}, seconds, spread as a share]")
    shape = tuple(_value(value, SHAPE, where) for value in row[:-2])
    return Sample(shape, _value(row[-2], SECONDS, where), _value(row[-1], SPREAD, where))


def _value(value: Any, field: Field, where: Where) -> Any:
    try:
        return field.read(value)
    except ValueError:
        raise where.error(f"has {show(value)}: must be {field.expected}") from None
