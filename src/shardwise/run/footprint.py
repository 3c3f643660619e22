"""What a worker's process needs beside its tensors and kernels, measured by small trainings with each kind of program.

On a CPU a worker's memory is that of its process: Python, torch, what a kind of program imports and keeps (the graph of
a step, say), and what the allocator leaves unused between tensors. A GPU counts its tensors alone.

The steps of the same trainings tell what hosts need beside kernels and messages: what takes longer than it is predicted
to take is put down to every step, and what is left of it to what `fully_shard` does for each group, a graph for each
pass, tensor parallelism for each exchange, blocks that are computed again for each kernel (`cluster.Device.overheads`).
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.cluster.cluster import OVERHEADS, Cluster, Device, Level, Nodes
from shardwise.cluster.team import Team
from shardwise.parallel.mesh import default_device
from shardwise.parallel.program import Program
from shardwise.run.job import Job, Options, Source
from shardwise.run.metrics import own_memory
from shardwise.run.train import train
from shardwise.strategy import Strategy
from shardwise.workload.recipes.models.vit import ViT
from shardwise.workload.workload import Workload

STEPS = 7
"""Of each training: some of them are profiled, as in every run."""

TIMED = 24
"""Further steps of each training, by the median of which it is timed."""

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
        strategy: how it was trained.
        grown: by how many bytes the process grew for it.
        trials: how long its steps took, by overhead.
    """

    process: Mapping[str, int]
    large: Workload
    strategy: Strategy
    grown: int
    trials: Mapping[str, Trial]

    def heap(self, device: Device) -> float:
        """Bytes that the process grows by for each byte of tensors, as they are predicted on `device`; at least 1."""
        from shardwise.predict.simulate import profiles_on, simulate  # not part of what a worker imports

        if not self.process:
            return 1.0
        cluster = Cluster(name="", nodes=(Nodes(device, self.strategy.workers, 1),), levels=(_ANY,))
        memory = simulate(profiles_on(self.large, cluster), self.strategy, cluster).memory
        passing = memory.activations + memory.temporary
        return max(1.0, 1.0 + (self.grown - memory.tensors) / passing)

    def overheads(self, cluster: Cluster) -> dict[str, float]:
        """Seconds by overhead, so that predictions on `cluster`, which knows none yet, become what was measured."""
        if not self.trials:
            return {}
        from shardwise.predict.profiling import Profiles
        from shardwise.predict.simulate import profiles_on, simulate

        known: dict[int, Profiles] = {}

        def predicted(strategy: Strategy, overheads: Mapping[str, float]) -> float:
            workers = strategy.workers
            profiles = known.setdefault(workers, profiles_on(_small(workers), cluster))
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
    if team.device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return Footprint({}, large, strategy, 0, {})
    small, workers = _small(team.size), team.size
    trials: dict[str, Trial] = {}

    def tried(name: str, split: Strategy) -> int:
        size, seconds = _peak(small, split, timed=TIMED)
        trials[name] = Trial(split, max(row[0] for row in team.gathered([seconds])))
        return size

    found = {"module": tried("step", Strategy(dp=workers))}
    plain = _settled()
    if workers > 1:
        found["sharded"] = tried("sharded", Strategy(fsdp=workers))
        residue = max(0, _settled() - plain)
        found["graph"] = tried("stage", Strategy(pp=workers, microbatches=2 * workers)) - residue
        if HEADS % workers == 0:
            tried("exchange", Strategy(tp=workers))
    tried("again", Strategy(dp=workers, recompute="full"))
    tried("selective", Strategy(dp=workers, recompute="selective"))
    process = _largest(team, found)
    before = _settled()
    grown = _largest(team, {"": _peak(large, strategy)[0] - before})[""]
    return Footprint(process, large, strategy, grown, trials)


def crowded_step() -> Trial | None:
    """A training by more workers than there are cores; collective."""
    team = Team(default_device())
    if team.device.type != "cpu":
        return None
    split = Strategy(dp=team.size)
    program = Program.build(_small(team.size), split)
    _median_step(program, STEPS)
    return Trial(split, max(row[0] for row in team.gathered([_median_step(program, TIMED)])))


def _largest(team: Team, found: Mapping[str, int]) -> dict[str, int]:
    by_rank = team.gathered([float(value) for value in found.values()])
    return {kind: int(max(column)) for kind, column in zip(found, zip(*by_rank, strict=True), strict=True)}


def _peak(workload: Workload, strategy: Strategy, timed: int = 0) -> tuple[int, float]:
    """Bytes that this process needs at most in a training, and seconds of the median of more steps. Collective."""
    _settled()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what there is (Linux, proc(5))
    job = Job(source=Source(workload=workload), strategy=strategy, options=Options(steps=STEPS, quiet=True))
    program = Program.build(workload, strategy)
    train(program, job)
    return own_memory()[0], _median_step(program, timed) if timed else 0.0


def _median_step(program: Program, count: int) -> float:
    share, took = next(program.loader().shares(0)), []
    for _ in range(count):
        start = time.perf_counter()
        program.step_share(share)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def _settled() -> int:
    """Bytes of this process once everything that can be given back is."""
    gc.collect()
    if sys.platform == "linux":
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return own_memory()[1]


def _small(workers: int) -> Workload:
    """With next to nothing to compute."""
    return _workload(hidden=32, batch=4 * workers)


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
