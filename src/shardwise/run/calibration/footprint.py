"""Memory and host time of a worker beside its tensors and kernels, measured by small trainings of each program kind.

On a CPU a worker's memory is that of its process: Python, torch, the modules and data of a kind of program (the graph
of a step, for example), and the gaps that the allocator leaves between tensors. On a GPU it is that of its tensors, and
of the workspaces that cuBLAS takes at its first call and never gives back.

The step times of these trainings also give the host's overheads beside kernels and messages. The excess over the
predicted step of a plain training becomes the overhead of each step. Further excess of the other kinds becomes the
overhead of `fully_shard` per group, of a graph per pass, of tensor parallelism per exchange, and of recomputed blocks
per kernel (`cluster.Device.overheads`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.cluster.cluster import OVERHEADS, Cluster, Device, Level, Nodes
from shardwise.cluster.measure.team import Team
from shardwise.options import FULL, SELECTIVE
from shardwise.parallel.mesh import default_device
from shardwise.parallel.program import Program
from shardwise.run.training.job import Job, Options
from shardwise.run.training.process_memory import give_back, own_memory, restart_peak
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.recipes.models.vit import ViT
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

STEPS = 7
"""Steps of a training whose memory is measured: enough for some of them to be profiled, as in every run."""

WARM, TIMED = 5, 20
"""Warm-up steps of a timed training, and steps after them whose median is taken."""

SECONDS, FEWEST = 3.0, 3
"""Seconds that a training is timed for at most, about, and least number of steps."""

LONG = 6
"""Timed steps of the large training, whose steps take a few tenths of a second."""

LEAST_STRAIN = 0.5
"""Lower bound of the strain: kernels cannot be twice as fast in a training as alone, so less is an artefact."""

CLASSES, HEADS = 10, 4


@dataclass(frozen=True, slots=True)
class FootprintTrial:
    """Small training: its strategy, and the seconds of its median step."""

    strategy: Strategy
    seconds: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """Measurements of small trainings, from which properties of a device are derived.

    Attributes:
        process: kind of program -> bytes of the process, or of GPU memory; empty if the system cannot measure it.
        large: workload with larger activations.
        trained: training of `large`.
        grown: bytes by which the process grew in that training.
        trials: overhead (see OVERHEADS) -> training whose step time determines it.
    """

    process: Mapping[str, int]
    large: Workload
    trained: FootprintTrial
    grown: int
    trials: Mapping[str, FootprintTrial]

    def heap(self, device: Device) -> float:
        """Return the bytes of process memory per byte of activations and temporary tensors; at least 1.

        Their sizes are predicted on `device`.
        """
        from shardwise.predict.simulate import profiles_on, simulate  # workers do not import it, and it would count

        if not self.process:
            return 1.0
        cluster = Cluster(name="", nodes=(Nodes(device, self.trained.strategy.workers, 1),), levels=(_ANY,))
        memory = simulate(profiles_on(self.large, cluster), self.trained.strategy, cluster).memory
        passing = memory.activations + memory.temporary
        return max(1.0, 1.0 + (self.grown - memory.tensors) / passing)

    def strain(self, cluster: Cluster) -> float:
        """Return the ratio of the time of kernels in a training to their predicted time on `cluster`.

        It is at least LEAST_STRAIN. Returns 1 if no training was timed.
        """
        if not self.trained.seconds:
            return 1.0
        from shardwise.predict.simulate import profiles_on, simulate

        prediction = simulate(profiles_on(self.large, cluster), self.trained.strategy, cluster)
        kernels = prediction.compute_seconds + prediction.optimizer_seconds
        return max(LEAST_STRAIN, 1.0 + (self.trained.seconds - prediction.step_seconds) / kernels)

    def overheads(self, cluster: Cluster) -> dict[str, float]:
        """Return the seconds of each overhead, so that predicted steps on `cluster` equal the measured ones.

        `cluster` itself must not have overheads yet. They are solved one after the other, in the order of OVERHEADS.
        """
        if not self.trials:
            return {}
        from shardwise.predict.profile.profiler import Profiles
        from shardwise.predict.simulate import profiles_on, simulate

        known: dict[int, Profiles] = {}

        def predicted(strategy: Strategy, overheads: Mapping[str, float]) -> float:
            workers = strategy.workers
            profiles = known.setdefault(workers, profiles_on(_usual(workers), cluster))
            return simulate(profiles, strategy, _with_overheads(cluster, overheads)).step_seconds

        found: dict[str, float] = {}
        for name in OVERHEADS:
            if name in self.trials:
                trial = self.trials[name]
                without = predicted(trial.strategy, found)
                slope = (predicted(trial.strategy, {**found, name: _TRIED}) - without) / _TRIED
                found[name] = max(0.0, trial.seconds - without) / slope if slope > 0 else 0.0
        return found


_TRIED = 1e-3
"""Seconds of a trial overhead, by which the derivative of the step time is computed."""


def _with_overheads(cluster: Cluster, overheads: Mapping[str, float]) -> Cluster:
    nodes = tuple(replace(each, device=replace(each.device, overheads=overheads)) for each in cluster.nodes)
    return replace(cluster, nodes=nodes)


_ANY = Level(name="any", span=2**30, bandwidth=1.0, latency=0.0)
"""Placeholder level for predictions of memory, which do not depend on the speed of links."""


def footprint() -> Footprint:
    """Measure small trainings with each kind of program. Collective.

    It must run in a fresh process: modules and memory of earlier work would be counted too.
    """
    team = Team(default_device())
    large, strategy = _large(team), Strategy(dp=team.size)
    if not _restart_peak(team.device):
        return Footprint({}, large, FootprintTrial(strategy, 0.0), 0, {})
    workers = team.size
    small = _workload(hidden=32, batch=4 * workers)
    found = {"module": _peak(team, small, Strategy(dp=workers))}
    plain = _settled(team.device)
    splits = {"step": Strategy(dp=workers)}
    if workers > 1:
        found["sharded"] = _peak(team, small, Strategy(fsdp=workers))
        residue = max(0, _settled(team.device) - plain)
        splits["sharded"] = Strategy(fsdp=workers)
        splits["stage"] = Strategy(pp=workers, microbatches=2 * workers)
        found["graph"] = _peak(team, small, splits["stage"]) - residue
        if HEADS % workers == 0:
            splits["exchange"] = Strategy(tp=workers)
    splits["again"] = Strategy(dp=workers, recompute=FULL)
    splits["selective"] = Strategy(dp=workers, recompute=SELECTIVE)
    process = _largest(team, found)
    before = _settled(team.device)
    grown = _largest(team, {"": _peak(team, large, strategy) - before})[""]
    trained = _tried(team, large, strategy, LONG)
    trials = {name: _tried(team, _usual(workers), split, TIMED) for name, split in splits.items()}
    return Footprint(process, large, trained, grown, trials)


def crowded_step() -> FootprintTrial | None:
    """Time a training by more workers than the host has cores. Collective. Returns None on a GPU."""
    team = Team(default_device())
    if team.device.type != "cpu":
        return None
    return _tried(team, _usual(team.size), Strategy(dp=team.size), TIMED)


def _tried(team: Team, workload: Workload, strategy: Strategy, count: int) -> FootprintTrial:
    """Time `count` steps of a training after a warm-up, and take the median of the slowest worker. Collective.

    Slow steps, as over slow network links, are timed fewer times, in about SECONDS.
    """
    program = Program.build(workload, strategy)
    if team.device.type == "cuda":  # a host that never waited for the device would be timed alone
        program.ask_before_update(lambda loss, square, search: True)
    share = next(program.loader().shares(0))

    def steps(number: int) -> list[float]:
        took = []
        for _ in range(number):
            start = time.perf_counter()
            program.step_share(share)
            took.append(time.perf_counter() - start)
        return took

    def slowest(seconds: float) -> float:
        return max(row[0] for row in team.gathered([seconds]))

    one = slowest(steps(2)[-1])
    steps(WARM - 2 if one * WARM < SECONDS else 0)
    return FootprintTrial(strategy, slowest(statistics.median(steps(max(FEWEST, min(count, int(SECONDS / one)))))))


def _largest(team: Team, found: Mapping[str, int]) -> dict[str, int]:
    by_rank = team.gathered([float(value) for value in found.values()])
    return {kind: int(max(column)) for kind, column in zip(found, zip(*by_rank, strict=True), strict=True)}


def _peak(team: Team, workload: Workload, strategy: Strategy) -> int:
    """Return the peak memory of this process in a short training, in bytes. Collective."""
    _settled(team.device)
    _restart_peak(team.device)
    job = Job(source=Source(workload=workload), strategy=strategy, options=Options(steps=STEPS, quiet=True))
    most = train(Program.build(workload, strategy), job).summary["memory_bytes_by_worker"]
    return int(most[team.rank])


def _settled(device: torch.device) -> int:
    """Return the memory of this process, or of its tensors on a GPU, in bytes, after all free memory is given back."""
    give_back()
    if device.type != "cuda":
        return own_memory()[1]
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _restart_peak(device: torch.device) -> bool:
    """Reset the peak memory of this process, or of its tensors on a GPU. Returns False if the system cannot."""
    if device.type != "cuda":
        return restart_peak()
    torch.cuda.reset_peak_memory_stats(device)
    return True


def _large(team: Team) -> Workload:
    """Build a workload whose kernels keep a device of this kind busy, whatever its host does."""
    if team.device.type == "cuda":
        return _workload(hidden=1024, batch=16 * team.size, image=64, heads=16)
    return _workload(hidden=128, batch=64 * team.size, image=16)


def _usual(workers: int) -> Workload:
    """Build a workload with as much compute between two exchanges as small models have; workers wait for each other."""
    return _workload(hidden=64, batch=16 * workers, image=16)


def _workload(hidden: int, batch: int, image: int = 8, heads: int = HEADS) -> Workload:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, image, image, generator=generator)
    return Workload(
        name="footprint",
        model=lambda: ViT(
            image_size=image,
            patch_size=2,
            channels=1,
            classes=CLASSES,
            layers=4,
            hidden=hidden,
            heads=heads,
            dropout=0.0,
        ),
        dataset=TensorDataset(images, torch.arange(batch) % CLASSES),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=batch,
    )
