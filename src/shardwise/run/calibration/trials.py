"""Measurements of small trainings, and the properties of a device that are derived from them.

The step times of these trainings give the host's overheads beside kernels and messages. The excess over the predicted
step of a small training becomes the overhead of each step. The excess of other kinds of programs over a plain one
becomes the overhead of `fully_shard` per gather and scatter, of a graph per pass, of tensor parallelism per exchange,
and of recomputed blocks per kernel (`cluster.Device.overheads`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardwise.cluster.cluster import OVERHEADS, Cluster, Device, Level, Nodes
from shardwise.cluster.measure import machine
from shardwise.strategy import Strategy
from shardwise.workload.recipes.models.vit import ViT
from shardwise.workload.workload import Workload

if TYPE_CHECKING:  # workers do not import it, and it would count in their memory
    from shardwise.predict.prediction import Prediction

LEAST_STRAIN = 0.5
"""Lower bound of the strain: kernels cannot be twice as fast in a training as alone, so less is an artefact."""

CLASSES, HEADS = 10, 4

PLAIN = "plain"
"""Name of the data-parallel training with which those of the other strategies are compared."""


@dataclass(frozen=True, slots=True)
class FootprintTrial:
    """Small training: its strategy, and the seconds of its median step.

    Attributes:
        strategy: strategy of the training.
        seconds: seconds of its median step on the slowest worker.
        spread: interquartile range of its steps divided by their median, on the worker on which it is largest.
        samples: samples of a step.
    """

    strategy: Strategy
    seconds: float
    spread: float = 0.0
    samples: int = 0

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds


@dataclass(frozen=True, slots=True)
class Footprint:
    """Measurements of small trainings, from which properties of a device are derived.

    Attributes:
        process: kind of program -> bytes of the process, or of GPU memory; empty if the system cannot measure it.
        large: workload with larger activations.
        trained: training of `large`.
        grown: bytes by which the process grew in that training.
        trials: overhead (see OVERHEADS) -> training whose step time determines it; and PLAIN.
        libraries: package (see LIBRARIES) -> bytes by which the process grows if a model imports it.
        busy: cores that other programs used during the timed trainings.
    """

    process: Mapping[str, int]
    large: Workload
    trained: FootprintTrial
    grown: int
    trials: Mapping[str, FootprintTrial]
    libraries: Mapping[str, int] = field(default_factory=dict)
    busy: float = 0.0

    @property
    def spreads(self) -> dict[str, float]:
        """Spread of the steps behind each overhead."""
        return {name: round(trial.spread, 3) for name, trial in self.trials.items() if name in OVERHEADS}

    @property
    def crowding(self) -> float | None:
        """Samples per second with more workers than cores, as a multiple of those with as many workers as cores.

        None if one of the two was not measured.
        """
        crowded, plain = self.trials.get("crowded"), self.trials.get(PLAIN)
        if crowded is None or plain is None or plain.strategy.workers > machine.cores():
            return None
        return crowded.rate / plain.rate

    @property
    def reference(self) -> dict[str, Any]:
        """Fields of `Device` about the reference training, which is the plain one; empty if none was timed."""
        plain = self.trials.get(PLAIN)
        if plain is None:
            return {}
        return {"reference_seconds": plain.seconds, "reference_workers": plain.strategy.workers}

    def with_crowd(self, crowd: FootprintTrial, busy: float) -> Footprint:
        """Return the measurements with those of a training by more workers than cores."""
        return replace(self, trials={**self.trials, "crowded": crowd}, busy=max(self.busy, busy))

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

        `cluster` itself must not have overheads yet. They are solved one after the other, in the order of OVERHEADS:
        first that of each step, from a model whose kernels take little time. The others come from a larger one, all of
        whose kernels take longer than predicted by the ratio at which its plain training does.
        """
        if not self.trials:
            return {}
        from shardwise.predict.profile.source import ProfileSource
        from shardwise.predict.simulate import profiles_on, simulate

        known: dict[tuple[Callable[[int], Workload], int], ProfileSource] = {}
        found: dict[str, float] = {}
        longer = 1.0

        def predicted(name: str, overheads: Mapping[str, float]) -> Prediction:
            strategy = self.trials[name].strategy
            key = small if name == "step" else usual, strategy.workers
            if key not in known:
                known[key] = profiles_on(key[0](strategy.workers), cluster)
            return simulate(known[key], strategy, _with_overheads(cluster, overheads))

        def seconds(name: str, overheads: Mapping[str, float]) -> float:
            prediction = predicted(name, overheads)
            return prediction.step_seconds + (longer - 1.0) * prediction.compute_seconds

        for name in (name for name in OVERHEADS if name in self.trials):
            without = seconds(name, {**found, name: 0.0})
            slope = (seconds(name, {**found, name: _TRIED}) - without) / _TRIED
            found[name] = max(0.0, self.trials[name].seconds - without) / slope if slope > 0 else 0.0
            if name == "step":
                plain = predicted(PLAIN, found)
                longer = 1.0 + (self.trials[PLAIN].seconds - plain.step_seconds) / plain.compute_seconds
        return found


_TRIED = 1e-3
"""Seconds of a trial overhead, by which the derivative of the step time is computed."""


def _with_overheads(cluster: Cluster, overheads: Mapping[str, float]) -> Cluster:
    nodes = tuple(replace(each, device=replace(each.device, overheads=overheads)) for each in cluster.nodes)
    return replace(cluster, nodes=nodes)


_ANY = Level(name="any", span=2**30, bandwidth=1.0, latency=0.0)
"""Placeholder level for predictions of memory, which do not depend on the speed of links."""


def large(workers: int, *, gpu: bool) -> Workload:
    """Build a workload whose kernels keep a device of this kind busy, whatever its host does."""
    if gpu:
        return _workload(hidden=1024, batch=16 * workers, image=64, heads=16)
    return _workload(hidden=128, batch=64 * workers, image=16)


def small(workers: int) -> Workload:
    """Build a workload whose tensors are negligible beside a worker's process."""
    return _workload(hidden=32, batch=4 * workers)


def usual(workers: int) -> Workload:
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
