"""One training as each worker gets it, and how it gets there. What computes is imported by the workers only."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shardwise.ending import failing_exits
from shardwise.launch import stop, watch
from shardwise.launch.context import is_first, under_launcher
from shardwise.launch.join import join_launcher
from shardwise.launch.local import run_local
from shardwise.launch.signals import Terminated
from shardwise.run.lock import released
from shardwise.run.result import Forecast, Step, Trained
from shardwise.run.runfolder import discard_unused
from shardwise.run.workers import Workers
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    from shardwise.parallel.planning import Cuts


STOP, SKIP, GO = "stop", "skip", "go"
POLICIES = (STOP, SKIP, GO)
"""What may be done at a step whose loss or gradient is not finite, see `run.guard`."""

PATIENCE_SECONDS = 15.0
"""How much longer the parent waits for a stopped worker than its peers do, who can tell more of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a workload comes from. Workers load it themselves where it has a name, so that no data is sent around.

    Attributes:
        workload: its name (see `workload.load`), or itself.
        settings: parameter -> value for the function of that name.
        seed: goes before the workload's own.
    """

    workload: str | Workload
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def load(self) -> Workload:
        """The workload. Raises WorkloadError or DataError."""
        named = self.workload
        workload = load_workload(named, self.settings) if isinstance(named, str) else named
        return workload if self.seed is None else replace(workload, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How long to train and what to keep.

    Attributes:
        steps: optimizer steps at the end, those before a resume included; None: as many as the epochs have.
        epochs: passes over the dataset at the end; None: as many as the steps need.
        checkpoint_every: optimizer steps between two checkpoints; 0: one after each epoch. The last step has one too.
        keep: how many checkpoints stay.
        resume: go on from the newest checkpoint in the run's folder, where there is one.
        quiet: no progress bar.
        weights: give back the trained weights.
        hang_timeout: seconds that a worker may take for a step before the run counts as hung; None: see `launch.watch`.
        grace: seconds that a run has to write a checkpoint once it is told to end.
        on_nan: at a step whose loss or gradient is not finite: `stop`, `skip` its update, or `go` on.
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

    def total(self, batches: int | None) -> int | None:
        """Optimizer steps at the end, of epochs of `batches` steps; None where that is not known before."""
        by_epochs = None if self.epochs is None or batches is None else self.epochs * batches
        return min((count for count in (self.steps, by_epochs) if count is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training, the same on every worker. Without a folder nothing is written to disk.

    Attributes:
        source: of the workload.
        strategy: how it is split.
        options: how long, and what is kept.
        folder: of the run.
        forecast: what it is predicted to take.
        cuts: of the model into stages and blocks, where a plan file says; None: as measured costs say.
    """

    source: Source
    strategy: Strategy
    options: Options
    folder: Path | None = None
    cuts: Cuts | None = None
    forecast: Forecast = field(default_factory=lambda: Forecast(reason="nothing was predicted"))


def run_job(job: Job, *, threads: int | None = None, gpus: bool | None = None) -> Trained:
    """Does a job on local workers, or as one of the workers of an outer launcher.

    Args:
        job: what to do.
        threads: of each local worker; None: the cores shared out evenly.
        gpus: whether local workers use GPUs; None: where there is one for each.

    Raises:
        WorkerFailed: a local worker died.
        RequestError: a worker found the request wrong.
    """
    with released(job.folder):
        return _run(job, threads, gpus)


def _run(job: Job, threads: int | None, gpus: bool | None) -> Trained:
    if under_launcher():
        join_launcher(job.strategy.workers)
        with failing_exits():
            return _unless_stopped(_everywhere(work(job)))
    workers = job.strategy.workers
    try:
        trained: Trained = run_local(
            work,
            (job,),
            workers=workers,
            threads=threads,
            gpus=enough_gpus(workers) if gpus is None else gpus,
            grace=0.0 if job.folder is None else job.options.grace,
            patience=watch.limits(job.options.hang_timeout, job.forecast.seconds).idle + PATIENCE_SECONDS,
        )
    except BaseException as error:
        if job.folder is not None and not job.options.resume:
            discard_unused(job.folder)
        if isinstance(error, Terminated) and job.folder is not None:
            sys.stderr.write(f"shardwise: told to end: no checkpoint was written within {job.options.grace:g} s\n")
        raise
    return _unless_stopped(trained)


def _unless_stopped(trained: Trained) -> Trained:
    """Return what was trained. Raises Terminated, and says so, where a signal ended it before its time."""
    if not trained.stopped:
        return trained
    if is_first():
        summary = trained.summary
        kept = f"a checkpoint is in {summary['run']}, --resume goes on" if summary["run"] else "nothing was kept"
        sys.stderr.write(f"shardwise: told to end after step {summary['steps']}: {kept}\n")
    raise Terminated(128 + trained.stopped)


def work(job: Job) -> Trained:
    """Do a job, as one of its workers. Collective."""
    from shardwise.parallel.program import Program
    from shardwise.run.train import train

    if job.folder is not None:
        stop.listen(job.options.grace)
    with watch.watching(watch.limits(job.options.hang_timeout, job.forecast.seconds)):
        program = Program.build(job.source.load(), job.strategy, cuts=job.cuts)
        return train(program, job)


def _everywhere(trained: Trained) -> Trained:
    """What rank 0 knows about the steps, on all workers of an outer launcher. Collective."""
    mine = json.dumps({"summary": trained.summary, "steps": [asdict(step) for step in trained.steps]})
    first = json.loads(Workers().exchange(mine)[0])
    return replace(trained, summary=first["summary"], steps=tuple(Step(**step) for step in first["steps"]))


def enough_gpus(workers: int) -> bool:
    """Whether there is a GPU for each worker; says so where there are some, but too few."""
    count = torch.cuda.device_count()
    if 0 < count < workers:
        sys.stderr.write(f"{count} GPU for {workers} workers: they compute on the CPU\n")
    return count >= workers
