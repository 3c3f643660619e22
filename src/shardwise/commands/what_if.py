"""Predict a workload on other numbers of devices, bandwidths, batches and strategies, for a report.

Every number comes from the predictor of `simulate`, so that the report and the command line agree to the last digit.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.errors import RequestError
from shardwise.planner.explain import with_bandwidth
from shardwise.predict.document import candidate
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.simulate import simulate_batch
from shardwise.strategy import Strategy
from shardwise.workload.load import workload_parameters
from shardwise.workload.source import Source

BANDWIDTHS = (0.1, 0.5, 1.0, 2.0, 10.0)
"""Stops of the bandwidth: times that of all links of the cluster."""

BATCHES = (0.5, 1.0, 2.0)
"""Stops of the batch: times the workload's, as far as that is a whole number."""

MORE = 4
"""Times the devices up to which more are looked at, on a cluster of the catalogue."""

MOST_STOPS = 5
"""Largest number of stops of the devices: the largest ones are kept, and the present one."""

_COUNTED = re.compile(r"(.+)x([1-9][0-9]*)")
"""Cluster of the catalogue with its number of devices: `h100x16`."""

_KEYS = (
    "strategy",
    "step_seconds",
    "samples_per_second",
    "memory_bytes",
    "fits",
    "exposed_communication_seconds",
    "bubble_seconds",
)
"""Keys of a candidate that the report shows."""


@dataclass(frozen=True, slots=True)
class WhatIfSetting:
    """One setting of the sliders."""

    devices: int
    bandwidth: float
    batch: int


@dataclass(slots=True)
class WhatIf:
    """Predictions over devices, bandwidth and batch.

    Attributes:
        profiles: profiles of the workload.
        cluster: the cluster, with its margin and imported libraries settled.
        name: name or file of the cluster on the command line; empty for this machine.
        given: strategies of the report.
        devices: number of devices of the report.
        limit_seconds: processor time after which no further batch or number of devices is begun: those take traces.
    """

    profiles: ProfileSource
    cluster: Cluster
    name: str
    given: Sequence[Strategy]
    devices: int
    limit_seconds: float
    _clusters: dict[tuple[int, float], Cluster] = field(default_factory=dict)

    def document(self, source: Source | None) -> dict[str, Any]:
        """Return the document for the report: stops, cells, prices, and the command that repeats a cell."""
        batch = self.profiles.workload.batch_size
        devices = self._device_stops()
        batches = [round(batch * times) for times in BATCHES if (batch * times).is_integer()]
        here = WhatIfSetting(self.devices, 1.0, batch)
        places = [WhatIfSetting(*each) for each in product(devices, BANDWIDTHS, batches)]
        begin = time.process_time()
        cells: list[dict[str, Any]] = []
        traced: set[tuple[int, int]] = set()
        for place in sorted(places, key=lambda each: _distance(each, here)):
            late = traced and time.process_time() - begin > self.limit_seconds
            if not late or (place.devices, place.batch) in traced:
                traced.add((place.devices, place.batch))
                cells.append(self._cell(place))
        left = len(places) - len(cells)
        notes = [f"{left} of {len(places)} settings were left out, to write this page in time."] if left else []
        return {
            "devices": devices,
            "bandwidth": list(BANDWIDTHS),
            "batch": batches,
            "here": {"devices": here.devices, "bandwidth": here.bandwidth, "batch": here.batch},
            "cells": cells,
            "notes": notes,
            "dollars_per_hour": {str(count): price for count in devices if (price := self._price(count)) is not None},
            "clusters": {str(count): self._cluster_name(count) for count in devices},
            **_command(source),
        }

    def _device_stops(self) -> list[int]:
        most = self.devices * MORE if self._counted() else self.cluster.size
        powers = [1 << n for n in range(most.bit_length()) if 1 << n <= most]
        stops = sorted({*powers, self.devices, min(self.cluster.size, most)})
        kept = stops[-MOST_STOPS:]
        return sorted({*kept, self.devices, *stops[:1]})

    def _counted(self) -> re.Match[str] | None:
        return None if self.name.endswith(".toml") else _COUNTED.fullmatch(self.name)

    def _cluster_name(self, devices: int) -> str:
        """Return the cluster of so many devices as the command line names it."""
        counted = self._counted()
        if devices <= self.cluster.size or counted is None:
            return self.name
        return f"{counted[1]}x{devices}"

    def _cluster(self, devices: int, bandwidth: float) -> Cluster:
        key = devices if devices > self.cluster.size else 0, bandwidth
        if key not in self._clusters:
            found = self.cluster
            if key[0]:
                libraries = self.profiles.workload.libraries
                found = find_cluster(self._cluster_name(devices)).with_margin(self.cluster.margin).importing(libraries)
            self._clusters[key] = with_all_bandwidths(found, bandwidth)
        return self._clusters[key]

    def _price(self, devices: int) -> float | None:
        cluster = self._cluster(devices, 1.0)
        prices = [cluster.device(rank).price_per_hour for rank in range(devices)]
        return None if any(price is None for price in prices) else sum(price or 0.0 for price in prices)

    def _cell(self, place: WhatIfSetting) -> dict[str, Any]:
        cluster = self._cluster(place.devices, place.bandwidth)
        candidates: list[dict[str, Any]] = []
        rejected: list[dict[str, str]] = []
        for strategy in strategies_for(place.devices, self.given, self.cluster.node_size):
            try:
                prediction = simulate_batch(self.profiles, strategy, cluster, place.batch)
            except RequestError as error:
                rejected.append({"strategy": str(strategy), "reason": str(error)})
                continue
            whole = candidate(str(strategy), prediction)
            candidates.append({key: whole[key] for key in _KEYS})
        cell = {"devices": place.devices, "bandwidth": place.bandwidth, "batch": place.batch}
        return {**cell, "candidates": candidates, "rejected": rejected}


def with_all_bandwidths(cluster: Cluster, times: float) -> Cluster:
    """Return the cluster with `times` the bandwidth on each kind of link."""
    for level in cluster.levels if times != 1.0 else ():
        cluster = with_bandwidth(cluster, level.name, times)
    return cluster


def strategies_for(devices: int, given: Sequence[Strategy], node: int) -> list[Strategy]:
    """Return the strategies to look at on so many devices: each axis, products of two, and the given ones.

    Given strategies of other sizes are enlarged or shrunk along their data-parallel axis, as far as that is possible.
    Tensor parallel is looked at within a node alone, unless it is given.

    Args:
        devices: number of devices.
        given: strategies that the report is about.
        node: devices of a node.
    """
    found = {str(each): each for each in given if each.workers == devices}
    for each in (*_spread(devices, given), *_families(devices, node)):
        found.setdefault(str(each), each)
    return list(found.values())


def _spread(devices: int, given: Sequence[Strategy]) -> Iterator[Strategy]:
    for each in given:
        axis = "fsdp" if each.fsdp > 1 else "dp"
        rest = each.workers // getattr(each, axis)
        if each.workers > 1 and not each.shares and not each.speeds and devices % rest == 0 and devices // rest > 1:
            yield each.with_(**{axis: devices // rest})


def _families(devices: int, node: int) -> Iterator[Strategy]:
    if devices == 1:
        yield Strategy()
        return
    for axis in ("dp", "fsdp", "tp") if devices <= node else ("dp", "fsdp"):
        yield Strategy.parse(f"{axis}={devices}")
    yield Strategy.parse(f"pp={devices},microbatches={2 * devices}")
    if devices % 2 == 0 and devices > 2 and node > 1:
        half = devices // 2
        for first in ("dp", "fsdp"):
            yield Strategy.parse(f"{first}={half},tp=2")
            yield Strategy.parse(f"{first}={half},pp=2,microbatches=4")
    if devices % node == 0 and devices > node > 2:
        yield Strategy.parse(f"dp={devices // node},tp={node}")
        yield Strategy.parse(f"fsdp={devices // node},tp={node}")


def _distance(place: WhatIfSetting, here: WhatIfSetting) -> tuple[int, int, float]:
    """Return an order in which settings that differ in fewer sliders come first, and another batch last of these."""
    batch = place.batch != here.batch
    differ = (place.devices != here.devices) + (place.bandwidth != here.bandwidth) + batch
    return differ, int(batch), abs(place.devices - here.devices) + abs(place.bandwidth - 1.0)


def _command(source: Source | None) -> dict[str, str]:
    """Return the begin of the command that repeats a cell, and the name of the parameter that sets the batch."""
    if source is None or not isinstance(source.workload, str):
        return {}
    named = "batch_size" in workload_parameters(source.workload)
    command = shlex.join(source_words("simulate", source))
    return {"command": command, "batch_setting": "batch_size" if named else ""}


def source_words(command: str, source: Source) -> list[str]:
    """Return the words of a command line for a workload that has a name: the command, workload, settings and seed."""
    settings = [word for name, value in source.settings.items() for word in ("--set", f"{name}={value}")]
    seed = [] if source.seed is None else ["--seed", str(source.seed)]
    return ["shardwise", command, str(source.workload), *settings, *seed]
