"""Run jobs that leave a report in their folder, with predictions around the strategies that were trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shardwise.commands.forecast import own_cluster
from shardwise.commands.report import leaving_report, report_in
from shardwise.errors import ShardwiseError
from shardwise.run.calibration.local_cluster import SETTING, cached_file
from shardwise.run.training.execute import run_job
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

if TYPE_CHECKING:
    from shardwise.run.training.job import Job
    from shardwise.run.training.result import Trained

RUN_SECONDS, COMPARISON_SECONDS = 3.0, 12.0
"""Processor time for the settings of the what-if panel of a run and of a comparison, which takes minutes anyway."""


def run_reported(job: Job) -> Trained:
    """Run a job as `run_job` does, and leave a report in its folder; the summary then has its path as `report`."""
    with leaving_report(job.folder, what_if_of([job])):
        trained = run_job(job)
    return replace(trained, summary={**trained.summary, **report_in(job.folder)})


def what_if_of(jobs: Sequence[Job], threads: int | None = None) -> Callable[[], Mapping[str, Any]] | None:
    """Return the function that makes the what-if panel of jobs. Returns None if nothing was predicted for them."""
    if all(job.forecast.seconds is None for job in jobs):
        return None
    seconds = RUN_SECONDS if len(jobs) == 1 else COMPARISON_SECONDS
    return partial(own_what_if, jobs[0].source, [job.strategy for job in jobs], seconds, threads)


def own_what_if(
    source: Source, strategies: Sequence[Strategy], seconds: float, threads: int | None = None
) -> Mapping[str, Any]:
    """Return the document of the what-if panel for runs on this machine; only a reason if nothing can be predicted.

    Args:
        source: source of the workload.
        strategies: strategies that were trained; the one of most workers says where the panel begins.
        seconds: processor time for its settings.
        threads: intra-op threads of each worker; None: an even share of the cores.
    """
    from shardwise.commands.predicted import what_if_document
    from shardwise.predict.simulate import profiles_on  # slow to import, because it traces models

    try:
        cluster = own_cluster(threads, quiet=True)
        workload = source.load()
        cluster = cluster.importing(workload.libraries)
        name = os.environ.get(SETTING) or str(cached_file())
        largest = sorted(strategies, key=lambda strategy: -strategy.workers)
        return what_if_document(profiles_on(workload, cluster), cluster, name, largest, source, seconds)
    except ShardwiseError as error:
        return {"reason": str(error)}
    except Exception as error:  # the model can be trained, but not traced without its data
        return {"reason": f"{type(error).__name__}: {error}"}
