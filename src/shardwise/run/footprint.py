"""What a worker's process needs beside its tensors, measured by small trainings with each kind of program.

On a CPU a worker's memory is that of its process: Python, torch, what a kind of program imports and keeps (the graph of
a step, say), and what the allocator leaves unused between tensors. A GPU counts its tensors alone.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.cluster.cluster import Cluster, Device, Level, Nodes
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

CLASSES = 10


@dataclass(frozen=True, slots=True)
class Footprint:
    """What was measured.

    Attributes:
        process: kind of program -> bytes of the process; empty where memory is not that of the process.
        large: a workload with larger activations.
        strategy: how it was trained.
        grown: by how many bytes the process grew for it.
    """

    process: Mapping[str, int]
    large: Workload
    strategy: Strategy
    grown: int

    def heap(self, device: Device) -> float:
        """Bytes that the process grows by for each byte of tensors, as they are predicted on `device`; at least 1."""
        from shardwise.predict.simulate import profiles_on, simulate  # not part of what a worker imports

        if not self.process:
            return 1.0
        cluster = Cluster(name="", nodes=(Nodes(device, self.strategy.workers, 1),), levels=(_ANY,))
        memory = simulate(profiles_on(self.large, cluster), self.strategy, cluster).memory
        passing = memory.activations + memory.temporary
        return max(1.0, 1.0 + (self.grown - memory.tensors) / passing)


_ANY = Level(name="any", span=2**30, bandwidth=1.0, latency=0.0)
"""For predictions of memory: how fast workers communicate does not matter."""


def footprint() -> Footprint:
    """Trains with each kind of program; collective. To be asked before anything else has been imported and computed."""
    team = Team(default_device())
    large, strategy = _workload(hidden=128, batch=64 * team.size, image=16), Strategy(dp=team.size)
    if team.device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return Footprint({}, large, strategy, 0)
    small, workers = _workload(hidden=32, batch=4 * team.size), team.size
    found = {"module": _peak(small, Strategy(dp=workers))}
    plain = _settled()
    if workers > 1:
        found["sharded"] = _peak(small, Strategy(fsdp=workers))
        residue = max(0, _settled() - plain)
        found["graph"] = _peak(small, Strategy(pp=workers)) - residue
    process = _largest(team, found)
    before = _settled()
    grown = _largest(team, {"": _peak(large, strategy) - before})[""]
    return Footprint(process, large, strategy, grown)


def _largest(team: Team, found: Mapping[str, int]) -> dict[str, int]:
    by_rank = team.gathered([float(value) for value in found.values()])
    return {kind: int(max(column)) for kind, column in zip(found, zip(*by_rank, strict=True), strict=True)}


def _peak(workload: Workload, strategy: Strategy) -> int:
    """Bytes that this process needs at most in a training. Collective."""
    _settled()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what there is (Linux, proc(5))
    job = Job(source=Source(workload=workload), strategy=strategy, options=Options(steps=STEPS, quiet=True))
    train(Program.build(workload, strategy), job)
    return own_memory()[0]


def _settled() -> int:
    """Bytes of this process once everything that can be given back is."""
    gc.collect()
    if sys.platform == "linux":
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return own_memory()[1]


def _workload(hidden: int, batch: int, image: int = 8) -> Workload:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, image, image, generator=generator)
    return Workload(
        name="footprint",
        model=lambda: ViT(
            image_size=image, patch_size=2, channels=1, classes=CLASSES, layers=4, hidden=hidden, heads=4, dropout=0.0
        ),
        dataset=TensorDataset(images, torch.arange(batch) % CLASSES),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        batch_size=batch,
    )
