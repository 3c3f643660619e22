"""Calibration: measure this machine and the network links between its workers, and build a cluster with these curves.

cases        kernels, measured on one worker alone, then on several workers of a host at the same time
eager        host time beside the kernels
layouts      groups of workers that communicate, at the same time as their sibling groups
overlap      slowdown of kernels while their worker communicates
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.curves import curve_name
from shardwise.cluster.measure import machine
from shardwise.cluster.measure.arena import Arena
from shardwise.cluster.measure.collectives import OPERATIONS, collective_curves, layouts, sizes_on
from shardwise.cluster.measure.contention import shared
from shardwise.cluster.measure.host_link import host_of
from shardwise.cluster.measure.interference import await_quiet
from shardwise.cluster.measure.kernel_cases import KernelCase, all_cases
from shardwise.cluster.measure.kernel_sizes import CPU, GPU
from shardwise.cluster.measure.kernels import MeasuredKernel, Situation, kernel_curves
from shardwise.cluster.measure.overlap import overlap
from shardwise.cluster.measure.patience import Patience
from shardwise.cluster.measure.team import Team
from shardwise.errors import RequestError
from shardwise.launch.context import rank_context
from shardwise.launch.join import join_launcher
from shardwise.launch.local import enough_gpus, run_local
from shardwise.parallel.mesh import default_device
from shardwise.predict.profile.segment_recorder import SegmentRecorder
from shardwise.run.calibration.assembly import derived, device_of
from shardwise.run.calibration.footprint import crowded_step, footprint
from shardwise.run.calibration.launching import launch_seconds
from shardwise.run.calibration.libraries import library_sizes
from shardwise.run.calibration.trials import Footprint
from shardwise.run.calibration.trust import faster_together, trusted

LARGEST = 4
"""Default number of workers of a calibration on a CPU: the number that the recipes are trained with."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Time to spend on a calibration, and the kernels to measure.

    Attributes:
        case: seconds for each case of a device.
        message: seconds for each size of a collective.
        other: seconds for each measurement that is not a curve.
        patience: longest seconds to wait for an idle machine, and for repeats of what other programs disturb.
        dtypes: dtypes to measure.
        cases: function that returns the cases of a dtype; None: all cases in the sizes of the device.
    """

    case: float = 0.01
    message: float = 0.02
    other: float = 0.5
    patience: float = 60.0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    cases: Callable[[torch.dtype], Sequence[KernelCase]] | None = None

    def on(self, device: torch.device) -> list[KernelCase]:
        """Return the cases to measure on a device. A GPU is so fast that it is always measured in all dtypes."""
        gpu = device.type == "cuda"
        of = self.cases or partial(all_cases, sizes=GPU if gpu else CPU)
        return [case for dtype in (THOROUGH.dtypes if gpu else self.dtypes) for case in of(dtype)]


THOROUGH = Effort()
QUICK = Effort(case=0.003, message=0.008, other=0.2, patience=30.0, dtypes=(torch.float32,))


def calibrate(workers: int | None = None, effort: Effort = THOROUGH, *, quiet: bool = False) -> Cluster | None:
    """Measure this machine with local workers, or with the workers of an outer launcher.

    Args:
        workers: largest number of workers; smaller numbers are measured too. None: 4 on a CPU, one for each GPU.
        effort: time to spend.
        quiet: show no progress bar.

    Returns:
        The measured cluster; None on ranks above 0 of an outer launcher.

    Raises:
        RequestError: the number of workers is below 1, or the outer launcher started another number.
        NotMeasured: other programs disturbed the measurement so much that its numbers are impossible.
        WorkerFailed: a worker died.
    """
    context = rank_context()
    if context is not None:
        join_launcher(workers or context.workers)
        await_quiet(effort.patience, quiet=quiet or context.rank != 0)
        found = work(effort, quiet, footprint(effort.patience))
        return None if found is None else trusted(found)
    count = torch.cuda.device_count() or LARGEST if workers is None else workers
    if count < 1:
        raise RequestError(f"workers={count}: must be 1 or more")
    gpus = enough_gpus(count)
    await_quiet(effort.patience, quiet=quiet)
    few = min(count, max(2, machine.cores()))  # the memory of a process does not depend on the number of workers
    patience = (effort.patience,)
    own: Footprint = run_local(footprint, patience, workers=few, gpus=gpus)
    crowd = run_local(crowded_step, patience, workers=count, gpus=gpus) if count > few and own.trials else None
    if crowd is not None:
        own = own.with_crowd(*crowd)
    if own.process and not gpus:
        own = replace(own, libraries=run_local(library_sizes, workers=1, gpus=gpus))
    return trusted(run_local(work, (effort, quiet, own), workers=count, gpus=gpus))


def work(effort: Effort, quiet: bool, own: Footprint) -> Cluster | None:
    """Measure as one of the workers, and return the cluster on rank 0. Collective. Returns None on other ranks.

    Args:
        effort: time to spend.
        quiet: show no progress bar.
        own: memory and step times of small trainings, from `footprint`.
    """
    context = rank_context()
    team = Team(default_device(), context.switch if context else "")
    arena = Arena(team.device)
    measured = [note(case, arena) for case in effort.on(team.device)]
    layered = list(layouts(team.hosts, team.near))
    settings = situations(team)
    patience = Patience(team, effort.patience)
    total = len(measured) * len(settings) + len(layered) * len(OPERATIONS) * len(sizes_on(team.device))
    tqdm.monitor_interval = 0  # keeps tqdm from starting a thread
    with tqdm(
        total=total,
        desc="calibrating",
        unit="case",
        disable=quiet or team.rank != 0,
        mininterval=0.2 if sys.stderr.isatty() else 5.0,
        dynamic_ncols=True,
    ) as bar:
        curves = [
            curve
            for each in settings
            for curve in patience.kept(partial(kernel_curves, measured, team, each, effort.case, bar.update))
        ]
        collectives = [
            curve
            for each in layered
            for curve in patience.kept(partial(collective_curves, team, each, effort.message, bar.update))
        ]
    slowed = patience.kept(partial(_slowed, team, effort.other))
    crowds: dict[int, float] = {}
    if team.device.type == "cpu":
        crowds = patience.kept(partial(shared, team, crowded(team), effort.other), faster_together)
    beside = host_of(team) if team.device.type == "cuda" else {}
    plain = device_of(team.device, curves, slowed, crowds) if team.rank == 0 else None

    def host() -> float:
        mine = 0.0 if plain is None else launch_seconds(plain, team.device, effort.other)
        return team.gathered([mine])[0][0]

    launching = patience.kept(host, lambda seconds: seconds <= 0)
    if plain is None:
        return None
    plain = replace(plain, **beside, origins={**plain.origins, **dict.fromkeys(beside, "measured")})
    found = derived(team, replace(plain, launch_seconds=launching), collectives, own)
    return replace(found, busy=round(max(own.busy, patience.busy), 3))


def _slowed(team: Team, seconds: float) -> float:
    """Return how much slower the workers of a host compute while they communicate; 1 for one worker. Collective.

    GPUs compute side by side without slowing each other, so that their kernels are measured on one worker alone, but
    what they communicate takes a part of each.
    """
    workers, threads = (len(team.hosts[0]), 1) if team.device.type == "cuda" else max(situations(team))
    return overlap(team, workers, threads, seconds) if workers > 1 else 1.0


def situations(team: Team) -> list[Situation]:
    """Return the pairs (workers, threads of each) to measure on a host.

    These are 1, 2, 4, ... workers with equal shares of the cores, and one worker alone with each of these numbers of
    threads. More workers than cores are extrapolated from fewer.
    """
    if team.device.type == "cuda":
        return [(1, 1)]
    together = crowded(team)
    return sorted({*together, *((1, threads) for _, threads in together)})


def crowded(team: Team) -> list[Situation]:
    """Return the pairs (workers, threads of each) for 1, 2, 4, ... workers of a host, up to its number of cores.

    Further workers would take turns on the cores, and each would be slower by the time that it waits for one.
    """
    cores = machine.cores()
    return [(count, cores // count) for count in _doubled(len(team.hosts[0])) if count <= cores]


def _doubled(most: int) -> list[int]:
    """Return the powers of two up to `most`, and `most` itself."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


def note(case: KernelCase, arena: Arena) -> MeasuredKernel:
    """Record the kernel of a case in the form in which the kernels of a model are recorded."""
    recorder = SegmentRecorder()
    operands = case.make(arena)
    with torch.no_grad(), recorder:
        case.call(*operands)
    kernel = max(recorder.take().kernels, key=lambda each: (each.flops, each.bytes))
    name = curve_name(kernel.kind, kernel.operation)
    if kernel.kind == "memory":
        return MeasuredKernel(case, "memory", name, kernel.dtype, False, (int(kernel.bytes),))
    return MeasuredKernel(case, kernel.kind, name, kernel.dtype, kernel.backward, kernel.shape)


def summary(cluster: Cluster, out: Path, seconds: float) -> dict[str, Any]:
    """Return the document of `calibrate`: the main figures of the measured cluster."""
    device = cluster.nodes[0].device
    kernels = [sample.spread for curve in device.curves for sample in curve.samples]
    spreads = kernels + [sample.spread for curve in cluster.collectives for sample in curve.samples]
    return {
        "cluster": str(out),
        "name": cluster.name,
        "workers": cluster.size,
        "hosts": sum(nodes.count for nodes in cluster.nodes),
        "flops": dict(device.flops),
        "memory_bandwidth": device.memory_bandwidth,
        "memory_bytes": device.memory_bytes,
        "launch_seconds": device.launch_seconds,
        "shared": {str(workers): factor for workers, factor in device.shared.items()},
        "overlap": device.overlap,
        "process_bytes": dict(device.process),
        "strain": device.strain,
        "heap": device.heap,
        "overhead_seconds": dict(device.overheads),
        "spreads": dict(device.spreads),
        "crowding": device.crowding,
        "busy_cores": cluster.busy,
        "levels": [
            {"name": level.name, "span": level.span, "bandwidth": level.bandwidth, "latency_seconds": level.latency}
            for level in cluster.levels
        ],
        "samples": len(spreads),
        "median_spread": statistics.median(spreads),
        "software": dict(cluster.software),
        "seconds": seconds,
    }
