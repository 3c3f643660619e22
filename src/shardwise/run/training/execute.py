"""Run a training job on local workers, or as one of the workers of an outer launcher.

Modules that compute are imported by the workers only.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, replace

from shardwise.launch import regroup, stop, watch
from shardwise.launch.context import is_first, under_launcher
from shardwise.launch.exit import failing_exits
from shardwise.launch.join import join_launcher
from shardwise.launch.local import enough_gpus, run_local
from shardwise.launch.signals import Terminated
from shardwise.run.control_group import Workers
from shardwise.run.training.job import Job
from shardwise.run.training.lock import released
from shardwise.run.training.messages import end_noted, warnings_noted
from shardwise.run.training.result import Step, Trained
from shardwise.run.training.run_folder import discard_unused

PATIENCE_SECONDS = 15.0
"""Seconds that the parent waits for a stopped worker beyond the limit of its peers, which can report more about it."""


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
    with released(job.folder), end_noted(job.folder):  # the end is noted while the lock is held
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
            restarts=regroup.restarts() if job.strategy.ps else 0,
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
    if under_launcher():
        Workers().exchange("")  # launchers end all workers when one has ended, maybe before rank 0 has said so
    raise Terminated(128 + trained.stopped)


def work(job: Job) -> Trained:
    """Run a job as one of its workers, and return the result. Collective."""
    from shardwise.parallel.program import Program
    from shardwise.run.training.join_point import JoinPoint
    from shardwise.run.training.train import train

    if job.folder is not None:
        stop.listen(job.options.grace)
    workload, join_point = job.source.load(), JoinPoint()
    with watch.watching(watch.limits(job.options.hang_timeout, job.forecast.seconds)):
        regroup.begin()
        while True:
            program = None
            try:
                program = Program.build(workload, job.strategy, cuts=job.cuts)
                with warnings_noted(job.folder if program.mesh.rank == 0 else None):
                    return train(program, job, join_point)
            except Exception as error:
                if join_point.progress is None or not regroup.expected(error):
                    raise
            join_point.lost = regroup.lost()
            del program
            gc.collect()  # connections and process groups of the program
            regroup.join()


def _everywhere(trained: Trained) -> Trained:
    """Return the result with rank 0's summary and steps, on all workers of an outer launcher. Collective."""
    mine = json.dumps({"summary": trained.summary, "steps": [asdict(step) for step in trained.steps]})
    first = json.loads(Workers().exchange(mine)[0])
    return replace(trained, summary=first["summary"], steps=tuple(Step(**step) for step in first["steps"]))
