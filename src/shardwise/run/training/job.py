"""Training jobs: the value that each worker receives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.run.training.result import Forecast
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

if TYPE_CHECKING:
    from shardwise.splitting.balance import Cuts


STOP, SKIP, GO = "stop", "skip", "go"
POLICIES = (STOP, SKIP, GO)
"""Policies for a step whose loss or gradient is not finite, see `run.training.guard`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a training besides workload and strategy: its length, checkpoints, output and limits.

    Attributes:
        steps: optimizer steps in total, including steps before a resume; None: as many as the epochs have.
        epochs: passes over the dataset in total; None: as many as the steps need.
        checkpoint_every: optimizer steps between two checkpoints; 0: one after each epoch. The last step has one too.
        keep: number of checkpoints to keep.
        resume: go on from the newest checkpoint in the run's folder, if there is one.
        quiet: show no progress bar.
        weights: return the trained weights.
        hang_timeout: seconds that a worker may take for a step before the run counts as hung; None: see `launch.watch`.
        grace: seconds that a run has to write a checkpoint once it is told to end.
        on_nan: policy for a step whose loss or gradient is not finite: `stop`, `skip` its update, or `go` on.
        proof: compare the first step with that of one process before the training begins.
        track: names of the trackers that get the metrics, see `run.training.tracking`; None: TensorBoard if installed.
    """

    steps: int | None = None
    epochs: int | None = None
    checkpoint_every: int = 0
    keep: int = 3
    resume: bool = False
    quiet: bool = False
    weights: bool = False
    hang_timeout: float | None = None
    grace: float = 20.0
    on_nan: str = STOP
    proof: bool = True
    track: tuple[str, ...] | None = None

    def total(self, batches: int | None) -> int | None:
        """Return the total number of optimizer steps, for epochs of `batches` steps. Returns None if it is unknown."""
        by_epochs = None if self.epochs is None or batches is None else self.epochs * batches
        return min((count for count in (self.steps, by_epochs) if count is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Training job; all workers receive equal ones.

    Attributes:
        source: source of the workload.
        strategy: strategy of the training.
        options: length, checkpoints, output and limits.
        folder: the run's folder; None: nothing is written to disk.
        forecast: predicted step time and memory.
        slice_steps: steps between two stops at the worker's gate, see `launch.gate`; 0: it never stops.
        cuts: cut points of the model into stages and blocks, from a plan; None: chosen by measured costs.
    """

    source: Source
    strategy: Strategy
    options: Options
    folder: Path | None = None
    slice_steps: int = 0
    cuts: Cuts | None = None
    forecast: Forecast = field(default_factory=lambda: Forecast(reason="nothing was predicted"))
