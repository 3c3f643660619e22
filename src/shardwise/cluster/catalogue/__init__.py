"""The catalogue: devices, links and nodes as they are sold, from the data files beside this module.

    device("h100")           one H100 SXM
    cluster("h100x1024")     1,024 of them in the nodes they are sold in
    cluster("p5x16")         16 devices in two p5 nodes
    cluster("dgx-a100")      one node

Names are found whatever their case, with spaces or underscores for hyphens, and with or without the maker. A name that
is not there is an error, never a stand-in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from shardwise.cluster.cluster import ORIGINS, Cluster, Device, Level, Nodes
from shardwise.cluster.fields import Field, Number, Part, Text, Where, read_table
from shardwise.cluster.reading import DEVICE, ORIGIN, PRICE, SOURCE, load_toml, parse_device, parse_level
from shardwise.errors import LONGEST_GUESS, ClusterError
from shardwise.strategy import MOST
from shardwise.units import parse_whole

FOLDER = Path(__file__).parent

_ALIASES = Part("an array of names", kind=list, default=[])
_NODE: dict[str, Field] = {
    "name": Text("of the node, as its maker spells it"),
    "aliases": _ALIASES,
    "device": Text("name of a device"),
    "devices": Number("devices in a node", whole=True),
    "links": Part("an array of tables", kind=list),
    "host": Part("a table", default=None),
    "price_per_hour": PRICE,
    "origin": Text("where the figures come from", choices=ORIGINS),
    "source": SOURCE,
}
_LINK: dict[str, Field] = {
    "link": Text("name of a link"),
    "span": Number("devices that one domain joins", whole=True, default=None),
    "ports": Number("ports of a node", whole=True, default=None),
}
_MEMORY: dict[str, Field] = {
    "memory_bytes": Number("bytes of a node", whole=True),
    "memory_bandwidth": Number("bytes per second of a node"),
    "link": Text("name of the link between a device and its host"),
    "ports": Number("such links of a node", whole=True, default=None),
    "origin": ORIGIN,
    "source": Text("where the figures were read"),
}
_HOST: dict[str, Field] = {
    "launch_seconds": DEVICE["launch_seconds"],
    "origin": ORIGIN,
    "source": Text("where the figure was read"),
}


@dataclass(frozen=True, slots=True)
class Link:
    """One level of links of a node.

    Attributes:
        link: name in the catalogue.
        span: devices that one domain joins; None: all of a node.
        ports: of a network, all devices of a node together; None within a node.
    """

    link: str
    span: int | None
    ports: int | None


@dataclass(frozen=True, slots=True)
class Host:
    """What a node has beside its devices.

    Attributes:
        memory_bytes: of its own memory.
        memory_bandwidth: of that in bytes per second.
        link: name of the link between a device and the host.
        ports: such links of a node; None: one for each device.
        origin: of these figures.
        source: where they were read.
    """

    memory_bytes: int
    memory_bandwidth: float
    link: str
    ports: int | None
    origin: str
    source: str


@dataclass(frozen=True, slots=True)
class NodeKind:
    """A node as it is sold.

    Attributes:
        key: name in the catalogue.
        name: as its maker spells it.
        aliases: other names.
        device: key of its device.
        devices: how many it has.
        links: innermost first; the last is the network.
        host: its own memory; None where that is not known.
        price_per_hour: of the node in US dollars.
        origin: of what it says.
        source: where it was read.
    """

    key: str
    name: str
    aliases: tuple[str, ...]
    device: str
    devices: int
    links: tuple[Link, ...]
    host: Host | None
    price_per_hour: float | None
    origin: str
    source: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A device with what only the catalogue knows of it: other names, and the node it is sold in."""

    device: Device
    aliases: tuple[str, ...]
    node: str


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        ClusterError: there is none; says the nearest known name.
    """
    names = _device_names()
    key = names.get(_plain(name))
    if key is None:
        raise ClusterError(f"device {name!r} is not in the catalogue{_near(name, names)}")
    return _entries()[key].device


def sold_in(name: str) -> str:
    """Key of the node that the device of that name is sold in. Raises ClusterError."""
    names = _device_names()
    key = names.get(_plain(name))
    if key is None:
        raise ClusterError(f"device {name!r} is not in the catalogue{_near(name, names)}")
    return _entries()[key].node


def devices() -> tuple[str, ...]:
    """Names of all devices."""
    return tuple(_entries())


def node(name: str) -> NodeKind:
    """The node of that name. Raises ClusterError."""
    names = _node_names()
    key = names.get(_plain(name))
    if key is None:
        raise ClusterError(f"node {name!r} is not in the catalogue{_near(name, names)}")
    return _nodes()[key]


def nodes() -> tuple[str, ...]:
    """Names of all nodes."""
    return tuple(_nodes())


def link(name: str, span: int) -> Level:
    """Links of that name that join `span` devices, with the bandwidth of one device or port. Raises ClusterError."""
    found = _links().get(_plain(name))
    if found is None:
        raise ClusterError(f"link {name!r} is not in the catalogue{_near(name, _links())}")
    return replace(found, span=span)


def links() -> tuple[str, ...]:
    """Names of all links."""
    return tuple(_links())


def cluster(spec: str) -> Cluster:
    """The cluster that a specification means: NAME, or NAMExN with N devices.

    NAME is a node, or a device in the node it is sold in. Without N it is one node; fewer devices than a node has are a
    part of one.

    Raises:
        ClusterError: an unknown name, or a number of devices that does not fill nodes.
    """
    kind, count = _parse(spec)
    count = kind.devices if count is None else count
    if count < 1:
        raise ClusterError(f"cluster {spec!r}: must have one device or more")
    if count > kind.devices and count % kind.devices:
        lower = count - count % kind.devices
        raise ClusterError(
            f"cluster {spec!r}: {count} devices do not fill nodes of {kind.devices} ({kind.name}); "
            f"{lower} or {lower + kind.devices} would"
        )
    held = min(count, kind.devices)
    return Cluster(
        name=spec,
        nodes=(Nodes(_placed(kind), held, count // held),),
        levels=_levels(kind, count) if count > 1 else (),
    )


def _parse(spec: str) -> tuple[NodeKind, int | None]:
    """(node, number of devices). A name that ends in an x and digits itself (`rtx4090`) is found as a whole first."""
    name, known = _plain(spec), {**_sold_in(), **_node_names()}
    counted = re.fullmatch(r"([^\n]+?)(?:-x-?|x)([0-9]+)", name)
    count = None
    if name not in known and counted:
        name, count = counted[1], _count(spec, counted[2])
    if name not in known:
        raise ClusterError(
            f"cluster {spec!r}: {name!r} is neither a device nor a node of the catalogue{_near(name, known)}; "
            "a cluster file must end in .toml or be there"
        )
    return _nodes()[known[name]], count


def _count(spec: str, digits: str) -> int:
    try:
        return parse_whole(digits, MOST)
    except ValueError:
        raise ClusterError(f"cluster {spec!r}: write 1 to {MOST} devices behind the x") from None


def _placed(kind: NodeKind) -> Device:
    """The node's device with its share of the node's price and of its host."""
    found = _entries()[kind.device].device
    if kind.price_per_hour is not None:
        found = replace(
            found,
            price_per_hour=kind.price_per_hour / kind.devices,
            origins={**found.origins, "price_per_hour": "assumed"},
            source=f"{found.source}; {kind.source}",
        )
    return found if kind.host is None else _hosted(found, kind.host, kind.devices)


def _hosted(device: Device, host: Host, devices: int) -> Device:
    """A device with its share of a host that has so many."""
    shares: dict[str, Any] = {
        "host_memory_bytes": host.memory_bytes // devices,
        "host_memory_bandwidth": host.memory_bandwidth / devices,
        "host_bandwidth": _links()[host.link].bandwidth * (host.ports or devices) / devices,
    }
    origins: Any = {**device.origins, **dict.fromkeys(shares, host.origin)}
    return replace(device, **shares, origins=origins, source=f"{device.source}; host: {host.source}")


def _levels(kind: NodeKind, count: int) -> tuple[Level, ...]:
    """Links that `count` devices in such nodes use, innermost first; the outermost spans all of them."""
    levels = []
    for entry in kind.links:
        found = _links()[entry.link]
        span = count if entry.ports else min(count, entry.span or kind.devices)
        share = entry.ports / kind.devices if entry.ports else 1.0
        origin = {"bandwidth": "assumed"} if kind.origin == "assumed" else {}
        origins: Any = {**found.origins, "span": kind.origin, **origin}
        source = f"{found.source}; {kind.name}: {kind.source}"
        levels.append(replace(found, span=span, bandwidth=found.bandwidth * share, origins=origins, source=source))
        if span == count:
            break
    return tuple(levels)


@cache
def _entries() -> dict[str, _Entry]:
    hosts = _hosts()
    fields = {name: field for name, field in DEVICE.items() if name != "launch_seconds"}
    entries = {}
    for key, table in load_toml(FOLDER / "devices.toml").items():
        where = Where("devices.toml", key)
        values = read_table(table, {**fields, "aliases": _ALIASES, "node": Text("name of a node")}, where)
        host = hosts[values["kind"]]
        values["launch_seconds"] = host["launch_seconds"]
        values["origins"] = {**values["origins"], "launch_seconds": host["origin"]}
        values["source"] = f"{' '.join(values['source'].split())}; launch_seconds: {host['source']}"
        aliases, sold_in = tuple(values.pop("aliases")), values.pop("node")
        present = {name: value for name, value in values.items() if value is not None}
        entries[key] = _Entry(parse_device(present, where), aliases, sold_in)
    return entries


@cache
def _hosts() -> dict[str, dict[str, Any]]:
    content = load_toml(FOLDER / "hosts.toml")
    return {kind: read_table(table, _HOST, Where("hosts.toml", kind)) for kind, table in content.items()}


@cache
def _links() -> dict[str, Level]:
    content = load_toml(FOLDER / "links.toml")
    return {
        key: parse_level({"name": key, "span": 1, **table}, Where("links.toml", key)) for key, table in content.items()
    }


@cache
def _nodes() -> dict[str, NodeKind]:
    kinds = {}
    for key, table in load_toml(FOLDER / "nodes.toml").items():
        where = Where("nodes.toml", key)
        values = read_table(table, _NODE, where)
        entries = [read_table(entry, _LINK, (where / "links").item(i)) for i, entry in enumerate(values["links"])]
        values["links"] = tuple(Link(**entry) for entry in entries)
        values["aliases"] = tuple(values["aliases"])
        if values["host"] is not None:
            values["host"] = Host(**read_table(values["host"], _MEMORY, where / "host"))
        kinds[key] = NodeKind(key, **values)
    return kinds


@cache
def _device_names() -> dict[str, str]:
    """Every name of a device -> its key."""
    return _keys((key, (entry.device.name, *entry.aliases)) for key, entry in _entries().items())


@cache
def _node_names() -> dict[str, str]:
    """Every name of a node -> its key."""
    return _keys((key, (kind.name, *kind.aliases)) for key, kind in _nodes().items())


def _keys(named: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """Every name, as it is looked up, -> the key that it belongs to; a key is a name too."""
    return {_plain(name): key for key, names in named for name in (key, *names)}


@cache
def _sold_in() -> dict[str, str]:
    """Every name of a device -> the node that it is sold in."""
    return {name: _entries()[key].node for name, key in _device_names().items()}


def _plain(name: str) -> str:
    """A name as it is looked up: lower case, hyphens, without the maker."""
    text = re.sub(r"[ _]+", "-", name.strip(" ").lower())
    return re.sub(r"^(nvidia|amd|intel|aws|azure|gcp)-(instinct-|geforce-)?", "", text)


def _near(name: str, names: Iterable[str]) -> str:
    """The nearest known names; all devices where none is near."""
    close = difflib.get_close_matches(_plain(name)[:LONGEST_GUESS], sorted(names), n=4, cutoff=0.5)
    if close:
        others = f" (also near: {', '.join(close[1:])})" if close[1:] else ""
        return f"; did you mean {close[0]!r}?{others}"
    return f"; known devices are {', '.join(devices())}"
