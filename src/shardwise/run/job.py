"""Training jobs: the value that each worker receives, and the way to run it on workers.

Modules that compute are imported by the workers only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shardwise.launch import stop, watch
from shardwise.launch.context import is_first, under_launcher
from shardwise.launch.exit import failing_exits
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
    from shardwise.splitting.balance import Cuts


STOP, SKIP, GO = "stop", "skip", "go"
POLICIES = (STOP, SKIP, GO)
"""Policies for a step whose loss or gradient is not finite, see `run.guard`."""

PATIENCE_SECONDS = 15.0
"""Seconds that the parent waits for a stopped worker beyond the limit of its peers, which can report more about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Source of a workload: its name or the workload itself. Workers load a named one themselves, so no data is sent.

    Attributes:
        workload: name of the workload (see `workload.load`), or the workload.
        settings: parameter -> value for the function of that name.
        seed: seed that overrides the workload's own; None: keep it.
    """

    workload: str | Workload
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def load(self) -> Workload:
        """Load the workload. Raises WorkloadError or DataError."""
        named = self.workload
        workload = load_workload(named, self.settings) if isinstance(named, str) else named
        return workload if self.seed is None else replace(workload, seed=self.seed)


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
        cuts: cut points of the model into stages and blocks, from a plan; None: chosen by measured costs.
    """

    source: Source
    strategy: Strategy
    options: Options
    folder: Path | None = None
    cuts: Cuts | None = None
    forecast: Forecast = field(default_factory=lambda: Forecast(reason="nothing was predicted"))


def run_job(job: Job, *, threads: int | None = None, gpus: bool | None = None) -> Trained:
    """Run a job on local workers, or as one of the workers of an outer launcher.

    Args:
        job: job to run.
        threads: intra-op threads of each local worker; None: an even share of the cores.
        gpus: True if local workers may use GPUs; None: if there is one for each.

    Raises:
        WorkerFailed: a local worker died.
        RequestError: a worker found the request wrong.
        Terminated: a signal told the run to end.
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
    """Return the result of a training. If a signal ended it early, print so and raise Terminated."""
    if not trained.stopped:
        return trained
    if is_first():
        summary = trained.summary
        kept = f"a checkpoint is in {summary['run']}, --resume goes on" if summary["run"] else "nothing was kept"
        sys.stderr.write(f"shardwise: told to end after step {summary['steps']}: {kept}\n")
    raise Terminated(128 + trained.stopped)


def work(job: Job) -> Trained:
    """Run a job as one of its workers, and return the result. Collective."""
    from shardwise.parallel.program import Program
    from shardwise.run.train import train

    if job.folder is not None:
        stop.listen(job.options.grace)
    with watch.watching(watch.limits(job.options.hang_timeout, job.forecast.seconds)):
        program = Program.build(job.source.load(), job.strategy, cuts=job.cuts)
        return train(program, job)


def _everywhere(trained: Trained) -> Trained:
    """Return the result with rank 0's summary and steps, on all workers of an outer launcher. Collective."""
    mine = json.dumps({"summary": trained.summary, "steps": [asdict(step) for step in trained.steps]})
    first = json.loads(Workers().exchange(mine)[0])
    return replace(trained, summary=first["summary"], steps=tuple(Step(**step) for step in first["steps"]))


def enough_gpus(workers: int) -> bool:
    """Return whether there is a GPU for each worker; print a line if there are some, but too few."""
    count = torch.cuda.device_count()
    if 0 < count < workers:
        sys.stderr.write(f"{count} GPU for {workers} workers: they compute on the CPU\n")
    return count >= workers
