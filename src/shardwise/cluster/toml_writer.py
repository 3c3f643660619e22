"""Write clusters as TOML in the format of `toml_reader`: readable, editable, and exact when read again."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve, Level, Sample
from shardwise.cluster.toml_fields import Field, Number
from shardwise.cluster.toml_reader import CLUSTER, DEVICE, LEVEL, NODES
from shardwise.errors import ClusterError

INLINE = ("flops", "shared", "origins", "process", "libraries", "overheads", "spreads")
"""Fields that are small tables, written as inline tables on one line each."""


def write_cluster(cluster: Cluster, path: Path | str) -> None:
    """Write a cluster file; `read_cluster` gives back an equal cluster.

    The write is atomic: the text goes to a temporary file in the same folder, which is then renamed.

    Raises:
        ClusterError: the file cannot be written.
    """
    path = Path(path)
    text = "\n".join(_cluster_lines(cluster)) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written: {error.strerror}") from None


def check_place(path: Path | str) -> None:
    """Check that a cluster file can be written at this path, before a long measurement is started for it.

    Raises:
        ClusterError: the file cannot be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise ClusterError(f"{path}: is a folder, give a file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ClusterError(f"{path}: cannot be written: {there} is not a folder that may be written to")


def _umask() -> int:
    """Return the process's umask, to give the file its usual permissions: a temporary file has only the owner's."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cluster_lines(cluster: Cluster) -> Iterator[str]:
    yield f"name = {_value(cluster.name)}"
    if cluster.software:
        yield f"software = {_inline(cluster.software)}"
    if cluster.busy:
        yield from _number_lines({"busy": cluster.busy}, CLUSTER)
    names = _names(cluster)
    for device, name in names.items():
        yield from _device_lines(device, name)
    for nodes in cluster.nodes:
        yield from ("", "[[nodes]]", f"device = {_value(names[_ByValue(nodes.device)])}")
        yield from _number_lines({"devices": nodes.devices, "count": nodes.count}, NODES)
    for level in cluster.levels:
        yield from ("", "[[levels]]", *_field_lines(level, LEVEL))
    for curve in cluster.collectives:
        yield from _collective_lines(curve)


class _ByValue:
    """A device as a dict key, compared by value; the device itself has mappings, which cannot be hashed."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and self.device == other.device

    def __hash__(self) -> int:
        return hash(self.device.name)


def _names(cluster: Cluster) -> dict[_ByValue, str]:
    """Map the different devices to their keys in the file, derived from the devices' names."""
    names: dict[_ByValue, str] = {}
    for nodes in cluster.nodes:
        same = _ByValue(nodes.device)
        if same in names:
            continue
        plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in nodes.device.name.lower())
        base = "-".join(part for part in plain.split("-") if part) or "device"
        taken = set(names.values())
        names[same] = next(
            name for name in (base, *(f"{base}-{number}" for number in range(2, 1000))) if name not in taken
        )
    return names


def _device_lines(same: _ByValue, name: str) -> Iterator[str]:
    device = same.device
    yield from ("", f"[devices.{name}]", *_field_lines(device, DEVICE))
    for curve in device.curves:
        yield from ("", f"[[devices.{name}.curves]]", *_kernel_lines(curve))


def _field_lines(thing: Device | Level, described: Mapping[str, Field]) -> Iterator[str]:
    """Yield one line for each field whose value is not the default, with the unit as a comment."""
    defaults = {field.name: getattr(field, "default", None) for field in fields(thing)}
    for name, field in described.items():
        value = getattr(thing, name)
        if name == "curves" or value is None or value == "" or (isinstance(value, Mapping) and not value):
            continue
        if name in ("overlap", "threads", "strain", "heap", "reference_workers") and value == defaults[name]:
            continue
        text = _inline(value) if name in INLINE else _value(value)
        yield f"{name} = {text}" + (f"  # {field.unit}" if isinstance(field, Number) else "")


def _number_lines(values: Mapping[str, float], described: Mapping[str, Field]) -> Iterator[str]:
    for name, value in values.items():
        field = described[name]
        yield f"{name} = {value}" + (f"  # {field.unit}" if isinstance(field, Number) else "")


def _kernel_lines(curve: KernelCurve) -> Iterator[str]:
    yield f"kind = {_value(curve.kind)}"
    if curve.operation:
        yield f"operation = {_value(curve.operation)}"
    yield f"dtype = {_value(curve.dtype)}"
    if curve.backward:
        yield "backward = true"
    if curve.workers != 1:
        yield f"workers = {curve.workers}"
    if curve.threads != 1:
        yield f"threads = {curve.threads}"
    yield from _sample_lines(curve.samples)


def _collective_lines(curve: CollectiveCurve) -> Iterator[str]:
    yield from ("", "[[collectives]]", f"operation = {_value(curve.operation)}")
    yield from (f"ranks = {curve.ranks}", f"nodes = {curve.nodes}")
    if curve.groups != 1:
        yield f"groups = {curve.groups}"
    if curve.level:
        yield f"level = {_value(curve.level)}"
    yield from _sample_lines(curve.samples)


def _sample_lines(samples: Sequence[Sample]) -> Iterator[str]:
    """Yield an array of rows [shape ..., seconds, spread]."""
    if not samples:
        yield "samples = []"
        return
    yield "samples = ["
    for sample in samples:
        row: Iterable[float] = (*sample.shape, sample.seconds, sample.spread)
        yield f"    [{', '.join(_value(value) for value in row)}],"
    yield "]"


def _inline(table: Mapping[Any, Any]) -> str:
    return "{ " + ", ".join(f"{_key(str(key))} = {_value(value)}" for key, value in table.items()) + " }"


def _key(key: str) -> str:
    plain = key.replace("_", "").replace("-", "")
    return key if plain.isascii() and plain.isalnum() else _value(key)


def _value(value: Any) -> str:
    """Spell a number or text in TOML; `repr` gives the shortest decimal that reads back as the same number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's basic strings follow JSON
