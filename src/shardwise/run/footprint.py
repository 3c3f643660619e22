"""What a worker's process needs beside its tensors and kernels, measured by small trainings with each kind of program.

On a CPU a worker's memory is that of its process: Python, torch, what a kind of program imports and keeps (the graph of
a step, say), and what the allocator leaves unused between tensors. A GPU counts its tensors alone.

The steps of the same trainings tell what hosts need beside kernels and messages: what takes longer than it is predicted
to take is put down to every step, and what is left of it to what `fully_shard` does for each group, a graph for each
pass, tensor parallelism for each exchange, blocks that are computed again for each kernel (`cluster.Device.overheads`).
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
from shardwise.cluster.team import Team
from shardwise.parallel.mesh import default_device
from shardwise.parallel.program import Program
from shardwise.run.job import Job, Options, Source
from shardwise.run.memory import give_back, own_memory, restart_peak
from shardwise.run.train import train
from shardwise.strategy import Strategy
from shardwise.workload.recipes.models.vit import ViT
from shardwise.workload.workload import Workload

STEPS = 7
"""Of a training whose memory is looked at: some of them are profiled, as in every run."""

WARM, TIMED = 5, 20
"""Steps of trainings that are timed: first some that are not counted, then those by whose median they are."""

SECONDS, FEWEST = 3.0, 3
"""About how long a training is timed, and by how many steps at least."""

LONG = 6
"""Of a training whose steps take a few tenths of a second."""

LEAST_STRAIN = 0.5
"""Of what kernels take alone: less is no property of a machine."""

CLASSES, HEADS = 10, 4


@dataclass(frozen=True, slots=True)
class Trial:
    """A small training: how it was split, and seconds of its median step."""

    strategy: Strategy
    seconds: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """What was measured.

    Attributes:
        process: kind of program -> bytes of the process; empty where memory is not that of the process.
        large: a workload with larger activations.
        trained: how it was trained.
        grown: by how many bytes the process grew for it.
        trials: how long its steps took, by overhead.
    """

    process: Mapping[str, int]
    large: Workload
    trained: Trial
    grown: int
    trials: Mapping[str, Trial]

    def heap(self, device: Device) -> float:
        """Bytes that the process grows by for each byte of tensors, as they are predicted on `device`; at least 1."""
        from shardwise.predict.simulate import profiles_on, simulate  # not part of what a worker imports

        if not self.process:
            return 1.0
        cluster = Cluster(name="", nodes=(Nodes(device, self.trained.strategy.workers, 1),), levels=(_ANY,))
        memory = simulate(profiles_on(self.large, cluster), self.trained.strategy, cluster).memory
        passing = memory.activations + memory.temporary
        return max(1.0, 1.0 + (self.grown - memory.tensors) / passing)

    def strain(self, cluster: Cluster) -> float:
        """How many times as long kernels took in a training as they are predicted to take on `cluster`."""
        if not self.trained.seconds:
            return 1.0
        from shardwise.predict.simulate import profiles_on, simulate

        prediction = simulate(profiles_on(self.large, cluster), self.trained.strategy, cluster)
        kernels = prediction.compute_seconds + prediction.optimizer_seconds
        return max(LEAST_STRAIN, 1.0 + (self.trained.seconds - prediction.step_seconds) / kernels)

    def overheads(self, cluster: Cluster) -> dict[str, float]:
        """Seconds by overhead, so that predictions on `cluster`, which knows none yet, become what was measured."""
        if not self.trials:
            return {}
        from shardwise.predict.profiling import Profiles
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
"""Seconds of an overhead with which it is seen what it does to a step."""


def _with_overheads(cluster: Cluster, overheads: Mapping[str, float]) -> Cluster:
    nodes = tuple(replace(each, device=replace(each.device, overheads=overheads)) for each in cluster.nodes)
    return replace(cluster, nodes=nodes)


_ANY = Level(name="any", span=2**30, bandwidth=1.0, latency=0.0)
"""For predictions of memory: how fast workers communicate does not matter."""


def footprint() -> Footprint:
    """Trains with each kind of program; collective. To be asked before anything else has been imported and computed."""
    team = Team(default_device())
    large, strategy = _workload(hidden=128, batch=64 * team.size, image=16), Strategy(dp=team.size)
    if team.device.type != "cpu" or not restart_peak():
        return Footprint({}, large, Trial(strategy, 0.0), 0, {})
    workers = team.size
    small = _workload(hidden=32, batch=4 * workers)
    found = {"module": _peak(team, small, Strategy(dp=workers))}
    plain = _settled()
    splits = {"step": Strategy(dp=workers)}
    if workers > 1:
        found["sharded"] = _peak(team, small, Strategy(fsdp=workers))
        residue = max(0, _settled() - plain)
        splits["sharded"] = Strategy(fsdp=workers)
        splits["stage"] = Strategy(pp=workers, microbatches=2 * workers)
        found["graph"] = _peak(team, small, splits["stage"]) - residue
        if HEADS % workers == 0:
            splits["exchange"] = Strategy(tp=workers)
    splits["again"] = Strategy(dp=workers, recompute="full")
    splits["selective"] = Strategy(dp=workers, recompute="selective")
    process = _largest(team, found)
    before = _settled()
    grown = _largest(team, {"": _peak(team, large, strategy) - before})[""]
    trained = _tried(team, large, strategy, LONG)
    trials = {name: _tried(team, _usual(workers), split, TIMED) for name, split in splits.items()}
    return Footprint(process, large, trained, grown, trials)


def crowded_step() -> Trial | None:
    """A training by more workers than there are cores; collective."""
    team = Team(default_device())
    if team.device.type != "cpu":
        return None
    return _tried(team, _usual(team.size), Strategy(dp=team.size), TIMED)


def _tried(team: Team, workload: Workload, strategy: Strategy, count: int) -> Trial:
    """The median of so many steps of a training, behind a few others; of the slowest worker. Collective.

    Fewer where they take long, as over slow links.
    """
    program = Program.build(workload, strategy)
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
    return Trial(strategy, slowest(statistics.median(steps(max(FEWEST, min(count, int(SECONDS / one)))))))


def _largest(team: Team, found: Mapping[str, int]) -> dict[str, int]:
    by_rank = team.gathered([float(value) for value in found.values()])
    return {kind: int(max(column)) for kind, column in zip(found, zip(*by_rank, strict=True), strict=True)}


def _peak(team: Team, workload: Workload, strategy: Strategy) -> int:
    """Bytes that this process needs at most in a training. Collective."""
    give_back()
    restart_peak()
    job = Job(source=Source(workload=workload), strategy=strategy, options=Options(steps=STEPS, quiet=True))
    most = train(Program.build(workload, strategy), job).summary["memory_bytes_by_worker"]
    return int(most[team.rank])


def _settled() -> int:
    """Bytes of this process once everything that can be given back is."""
    give_back()
    return own_memory()[1]


def _usual(workers: int) -> Workload:
    """With as much to compute between two exchanges as small models have: workers wait for each other there."""
    return _workload(hidden=64, batch=16 * workers, image=16)


def _workload(hidden: int, batch: int, image: int = 8) -> Workload:
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
            heads=HEADS,
            dropout=0.0,
        ),
        dataset=TensorDataset(images, torch.arange(batch) % CLASSES),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=batch,
    )
