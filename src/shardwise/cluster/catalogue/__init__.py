"""The catalogue: devices, links and nodes as they are sold, from the data files beside this module.

    device("h100")           one H100 SXM
    cluster("h100x1024")     1,024 of them in the nodes they are sold in
    cluster("p5x16")         16 devices in two p5 nodes
    cluster("dgx-a100")      one node

Look-up ignores case and the maker's name, and accepts spaces or underscores for hyphens. An unknown name is an error;
it never falls back to a similar entry.
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
from shardwise.cluster.toml_fields import Field, NestedTable, Number, Text, Where, read_table
from shardwise.cluster.toml_reader import DEVICE, ORIGIN, PRICE, SOURCE, load_toml, parse_device, parse_level
from shardwise.errors import LONGEST_GUESS, ClusterError
from shardwise.options import MOST
from shardwise.units import parse_whole

FOLDER = Path(__file__).parent

_ALIASES = NestedTable("an array of names", kind=list, default=[])
_NODE: dict[str, Field] = {
    "name": Text("of the node, as its maker spells it"),
    "aliases": _ALIASES,
    "device": Text("name of a device"),
    "devices": Number("devices in a node", whole=True),
    "links": NestedTable("an array of tables", kind=list),
    "host": NestedTable("a table", default=None),
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
        link: name of the link in the catalogue.
        span: number of devices that one domain joins. None means all devices of a node.
        ports: for a network, number of ports that all devices of a node share. None for links within a node.
    """

    link: str
    span: int | None
    ports: int | None


@dataclass(frozen=True, slots=True)
class Host:
    """Host memory of a node and the link by which devices reach it.

    Attributes:
        memory_bytes: bytes of host memory in the node.
        memory_bandwidth: bytes per second between the host's processors and its memory.
        link: name of the link between a device and the host.
        ports: number of such links in a node. None means one for each device.
        origin: where these figures come from, one of ORIGINS.
        source: reference in which the figures were read.
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
        name: name as its maker spells it.
        aliases: other names.
        device: key of its device.
        devices: number of devices in the node.
        links: levels of links, innermost first; the last is the network.
        host: host memory of the node. None if it is not known.
        price_per_hour: price of the node in US dollars per hour.
        origin: where these figures come from, one of ORIGINS.
        source: reference in which the figures were read.
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
class _CatalogueDevice:
    """A device with the facts that only the catalogue has: its other names and the node it is sold in."""

    device: Device
    aliases: tuple[str, ...]
    node: str


def device(name: str) -> Device:
    """Return the catalogue's device of this name.

    Raises:
        ClusterError: the catalogue has no such device; the message suggests the nearest known name.
    """
    names = _device_names()
    key = names.get(_plain(name))
    if key is None:
        raise ClusterError(f"device {name!r} is not in the catalogue{_near(name, names)}")
    return _entries()[key].device


def sold_in(name: str) -> str:
    """Return the key of the node in which the device is sold. Raises ClusterError if the device is unknown."""
    names = _device_names()
    key = names.get(_plain(name))
    if key is None:
        raise ClusterError(f"device {name!r} is not in the catalogue{_near(name, names)}")
    return _entries()[key].node


def devices() -> tuple[str, ...]:
    """Return the keys of all devices in the catalogue."""
    return tuple(_entries())


def node(name: str) -> NodeKind:
    """Return the catalogue's node of this name. Raises ClusterError if it is unknown."""
    names = _node_names()
    key = names.get(_plain(name))
    if key is None:
        raise ClusterError(f"node {name!r} is not in the catalogue{_near(name, names)}")
    return _nodes()[key]


def nodes() -> tuple[str, ...]:
    """Return the keys of all nodes in the catalogue."""
    return tuple(_nodes())


def link(name: str, span: int) -> Level:
    """Return a level of these links that joins `span` devices.

    Its bandwidth is that of one device or port. Raises ClusterError if the link is unknown.
    """
    found = _links().get(_plain(name))
    if found is None:
        raise ClusterError(f"link {name!r} is not in the catalogue{_near(name, _links())}")
    return replace(found, span=span)


def links() -> tuple[str, ...]:
    """Return the keys of all links in the catalogue."""
    return tuple(_links())


def cluster(spec: str) -> Cluster:
    """Build the cluster of a specification: NAME, or NAMExN with N devices.

    NAME is a node, or a device in the node it is sold in. Without N the cluster is one node. An N smaller than a node
    takes a part of one node.

    Raises:
        ClusterError: the name is unknown, or N devices do not fill whole nodes.
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
    """Split a specification into (node, number of devices); the number is None if it names none.

    A name that itself ends in an x and digits (`rtx4090`) is looked up as a whole first.
    """
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
    """Return the node's device with its share of the node's price and of its host."""
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
    """Return the device with its share of a host that serves `devices` devices."""
    shares: dict[str, Any] = {
        "host_memory_bytes": host.memory_bytes // devices,
        "host_memory_bandwidth": host.memory_bandwidth / devices,
        "host_bandwidth": _links()[host.link].bandwidth * (host.ports or devices) / devices,
    }
    origins: Any = {**device.origins, **dict.fromkeys(shares, host.origin)}
    return replace(device, **shares, origins=origins, source=f"{device.source}; host: {host.source}")


def _levels(kind: NodeKind, count: int) -> tuple[Level, ...]:
    """Return the levels of links that `count` devices use, innermost first; the outermost spans all of them."""
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
def _entries() -> dict[str, _CatalogueDevice]:
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
        entries[key] = _CatalogueDevice(parse_device(present, where), aliases, sold_in)
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
    """Map every name of a device to its key."""
    return _keys((key, (entry.device.name, *entry.aliases)) for key, entry in _entries().items())


@cache
def _node_names() -> dict[str, str]:
    """Map every name of a node to its key."""
    return _keys((key, (kind.name, *kind.aliases)) for key, kind in _nodes().items())


def _keys(named: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """Map every name, normalized for look-up, to its key; the key is one of the names."""
    return {_plain(name): key for key, names in named for name in (key, *names)}


@cache
def _sold_in() -> dict[str, str]:
    """Map every name of a device to the key of the node it is sold in."""
    return {name: _entries()[key].node for name, key in _device_names().items()}


def _plain(name: str) -> str:
    """Normalize a name for look-up: lower case, hyphens, without the maker."""
    text = re.sub(r"[ _]+", "-", name.strip(" ").lower())
    return re.sub(r"^(nvidia|amd|intel|aws|azure|gcp)-(instinct-|geforce-)?", "", text)


def _near(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known names, or all devices if none is near."""
    close = difflib.get_close_matches(_plain(name)[:LONGEST_GUESS], sorted(names), n=4, cutoff=0.5)
    if close:
        others = f" (also near: {', '.join(close[1:])})" if close[1:] else ""
        return f"; did you mean {close[0]!r}?{others}"
    return f"; known devices are {', '.join(devices())}"
