"""Implementation of the command `plan`: search, explanation, scaling curve, and plan files."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from shardwise.cluster.cluster import Cluster, check_margin
from shardwise.cluster.find import find_cluster
from shardwise.commands.launching import allocated_workers
from shardwise.commands.predicted import write_predicted
from shardwise.errors import DoesNotFit, RequestError, WorkloadError
from shardwise.launch.engines.choice import LOCAL
from shardwise.planner.constraints import Constraints
from shardwise.planner.document import front_rows, plan_document
from shardwise.planner.dry_run_check import judge
from shardwise.planner.explain import explanation
from shardwise.planner.garbage import few_collections
from shardwise.planner.launching.software import launch_document, own_launch_document
from shardwise.planner.pareto import front
from shardwise.planner.plan_file import PlanFile, read_plan, write_plan
from shardwise.planner.scaling import (
    Point,
    cheapest,
    counts,
    dollars,
    price,
    price_words,
    scaling,
    smallest_that_fits,
    worth,
)
from shardwise.planner.search.finalists import FINALISTS
from shardwise.planner.search.problem import room
from shardwise.planner.search.search import SearchResult
from shardwise.predict.document import needs
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.runtime.runtime import SHARDWISE
from shardwise.predict.simulate import check_own, profiles_on, simulate
from shardwise.run.calibration.local_cluster import cluster_at_hand
from shardwise.run.training.log import finite
from shardwise.strategy import Strategy
from shardwise.units import format_bytes, format_seconds, format_share, parse_whole
from shardwise.version import __version__
from shardwise.workload.load import names_function
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

CHANGED = 0.2
"""Relative difference between a plan file's step time and today's prediction above which the plan does not hold."""


@few_collections()
def planned(
    source: Source,
    cluster_text: str | None,
    workers: int | str | None,
    *,
    engine: str = LOCAL,
    objective: str,
    max_memory: str | None,
    fix: Sequence[str],
    forbid: Sequence[str],
    allow: Sequence[str] = (),
    out: Path | None,
    dry_run: bool = False,
    pareto: bool = False,
    margin: float | None = None,
    runtime: str = SHARDWISE.name,
    report: Path | None = None,
) -> dict[str, Any]:
    """Return the document of `plan`; see `api.plan` for the arguments and errors."""
    constraints = Constraints.parse(objective, max_memory, fix, forbid, allow)
    check_margin(margin)
    cluster = _cluster(cluster_text).with_margin(margin)
    if engine != LOCAL:
        workers = allocated_workers(engine, workers, cluster)
    numbers = _numbers(workers, cluster)
    if out is not None and not isinstance(source.workload, str):
        raise WorkloadError(f"out={out}: a plan file names its workload; give one by name, not as an object")
    check_own(runtime, {"--out": out is not None, "--dry-run": dry_run})
    workload = source.load()
    cluster = cluster.importing(workload.libraries)
    profiles = ScaledProfiles(profiles_on(workload, cluster, runtime))
    constraints.check_software(profiles.traced.software)
    points = scaling(workload, cluster, numbers, constraints, profiles)
    point = _chosen(points, cluster, constraints)
    if dry_run:
        point = replace(point, searched=_checked_by_dry_run(point.searched, cluster, constraints))
    plan = point.searched.plan
    if plan.best is None:
        raise DoesNotFit(_too_small(workload, cluster, point, constraints))
    words, cost = explanation(plan, cluster, point.searched.profile_of), price(point, cluster)
    if cost is not None and constraints.objective == "money":
        words.insert(2, price_words(cost, point.workers))
    document = plan_document(plan, words) | {"price": cost, "runtime": runtime}
    document |= _launch(source, profiles.traced, plan.best.strategy, cluster)
    if len(points) > 1:
        document |= _curve(points, cluster)
    if pareto:
        document["pareto"] = front_rows(front(workload, cluster, point.searched))
    if out is not None:
        write_plan(out, _file(source, cluster_text, point.searched, cluster))
        document["out"] = str(out)
    if report is not None:
        write_predicted(report, "plan", finite(document), profiles.traced, cluster, source, cluster_text or "")
        document["report"] = str(report)
    return document


def _launch(source: Source, profiles: ProfileSource, strategy: Strategy, cluster: Cluster) -> dict[str, Any]:
    """Return the launch of the chosen strategy; empty for Shardwise's own program and a workload without a name."""
    if profiles.software is not None:
        return {"launch": launch_document(profiles, strategy, cluster)}
    if not isinstance(source.workload, str):
        return {}
    settings = [f"{name}={value}" for name, value in source.settings.items()]
    return {"launch": own_launch_document(source.workload, strategy, settings)}


def _checked_by_dry_run(searched: SearchResult, cluster: Cluster, constraints: Constraints) -> SearchResult:
    """Return the search result after dry runs of its finalists, which reject those that need too much memory."""
    plan = judge(
        searched.plan, searched.profiles, cluster, room(cluster, searched.plan.workers, constraints), FINALISTS
    )
    return replace(searched, plan=plan)


def _cluster(text: str | None) -> Cluster:
    """Return the cluster of a name or file, or the cluster of this machine if `text` is None."""
    return cluster_at_hand() if text is None else find_cluster(text)


def _numbers(workers: int | str | None, cluster: Cluster) -> list[int]:
    """Return the numbers of devices to plan for: one number, several of a range `A..B`, or all that pay for None.

    Raises:
        RequestError: `workers` is no number or range, or exceeds the cluster.
    """
    if workers is None:
        return [cluster.worthwhile]
    first, dots, last = str(workers).partition("..")
    try:
        low, high = parse_whole(first), parse_whole(last if dots else first)
    except ValueError:
        raise RequestError(f"workers={workers}: give a number, or a range such as 1..64") from None
    if not 1 <= low <= high <= cluster.size:
        raise RequestError(f"workers={workers}: {cluster.name} has {cluster.size} devices, use 1 to {cluster.size}")
    return counts(low, high) if dots else [low]


def _chosen(points: Sequence[Point], cluster: Cluster, constraints: Constraints) -> Point:
    """Return the best point by the objective, or the one with most devices if no strategy fits at any point."""
    fitting = [point for point in points if point.rate]
    found: Point | None = None
    if constraints.objective == "money":
        found = cheapest(points, cluster)
    elif constraints.objective == "memory":
        found = min(fitting, key=_memory, default=None)
    else:
        found = max(fitting, key=lambda point: point.rate, default=None)
    return found or points[-1]


def _memory(point: Point) -> int:
    best = point.searched.plan.best
    assert best is not None
    return best.prediction.memory.total


def _too_small(workload: Workload, cluster: Cluster, point: Point, constraints: Constraints) -> str:
    plan = point.searched.plan
    if plan.smallest is None:
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in plan.rejected)) or "no strategy meets all wishes"
        raise RequestError(f"no strategy for {plan.workers} workers can be: {reasons}")
    need, have = plan.smallest.prediction.memory.total, room(cluster, plan.workers, constraints)
    number = smallest_that_fits(workload, cluster, plan.workers, constraints, point.searched.scaled)
    devices = "1 device" if plan.workers == 1 else f"{plan.workers} devices"
    hint = f"{number} of them would do" if number else "more of them would not help"
    return (
        f"{plan.workload} does not fit into {devices} of {cluster.name}: {plan.smallest.strategy} needs "
        f"least, {format_bytes(need)} of a device that has {format_bytes(have)} usable, {format_bytes(need - have)} "
        f"too much: "
        f"{hint}"
    )


def _curve(points: Sequence[Point], cluster: Cluster) -> dict[str, Any]:
    """Return the scaling curve of the best plans, and the number of devices beyond which more do not pay."""
    base = next((point for point in points if point.rate), None)
    rows = []
    for point in points:
        best = point.searched.plan.best
        speedup = point.rate / base.rate if base and best else None
        rows.append(
            {
                "workers": point.workers,
                "strategy": best and str(best.strategy),
                "step_seconds": best and best.prediction.step_seconds,
                "samples_per_second": best and best.prediction.samples_per_second,
                "speedup": speedup,
                "efficiency": speedup and base and speedup * base.workers / point.workers,
                "dollars_per_million_samples": dollars(point, cluster),
            }
        )
    last = worth(points)
    return {"scaling": rows, "worth_workers": last and last.workers}


def _file(source: Source, name: str | None, searched: SearchResult, cluster: Cluster) -> PlanFile:
    assert isinstance(source.workload, str)
    assert searched.plan.best is not None
    strategy, prediction = searched.plan.best.strategy, searched.plan.best.prediction
    return PlanFile(
        workload=source.workload,
        settings={key: str(value) for key, value in source.settings.items()},
        cluster=name or "",
        strategy=strategy,
        cuts=searched.cuts(strategy, cluster),
        prediction={
            "step_seconds": prediction.step_seconds,
            "samples_per_second": prediction.samples_per_second,
            "memory_bytes": prediction.memory.total,
            "alpha": prediction.alpha,
        },
        made_with=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of the software that a prediction depends on, by name."""
    return {"shardwise": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def checked(
    path: Path, cluster_text: str | None = None, named: str | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Return the document of a plan check: does the plan work, fit in memory, and take as long as the file says.

    Args:
        path: path of the plan file.
        cluster_text: cluster that replaces the plan's own; None: the plan's own.
        named: workload that the user trusts; a function that only the file names is not run.
        margin: share of the usable memory that has to stay free; None: the default.

    Returns:
        `plan`, `holds`, `reasons`, `notes`, and today's prediction beside the file's.

    Raises:
        RequestError: the file cannot be read, or its workload or cluster is wrong.
    """
    check_margin(margin)
    plan = read_plan(path)
    _check_workload(path, plan.workload, named)
    workload = Source(workload=plan.workload, settings=plan.settings).load()
    cluster = _cluster(cluster_text or plan.cluster or None).importing(workload.libraries).with_margin(margin)
    reasons = [
        f"made with {name} {version}, this is {now}"
        for name, version in plan.made_with.items()
        if (now := versions().get(name, "none")) != version
    ]
    broken: list[str] = []
    try:
        prediction = simulate(profiles_on(workload, cluster), plan.strategy, cluster)
    except RequestError as error:
        return _check_document(path, plan, None, [*broken, str(error)], reasons)
    if not prediction.fits:
        broken.append(f"a device {needs(prediction)}")
    then = plan.prediction.get("step_seconds")
    if then and abs(prediction.step_seconds / then - 1) > CHANGED:
        broken.append(
            f"a step is predicted to take {format_seconds(prediction.step_seconds)}, "
            f"{format_share(abs(prediction.step_seconds / then - 1))} off the {format_seconds(then)} in the file"
        )
    return _check_document(path, plan, prediction.step_seconds, broken, reasons)


def _check_workload(path: Path, workload: str, named: str | None) -> None:
    """Check that the user names the workload of a plan file, as far as needed.

    Raises:
        RequestError: the user names another workload than the file, or does not name a function, whose code would run.
    """
    if named is not None and named != workload:
        raise RequestError(f"plan file {path}: is of workload {workload!r}, not {named!r}")
    if named is None and names_function(workload):
        raise RequestError(
            f"plan file {path}: workload {workload!r} is a function, whose code would run: if you trust it, "
            f"name it too: shardwise plan {quote(workload)} --check {quote(str(path))}"
        )


def _check_document(
    path: Path, plan: PlanFile, seconds: float | None, broken: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "plan": str(path),
        "strategy": str(plan.strategy),
        "holds": not broken,
        "reasons": list(broken),
        "notes": list(notes),
        "step_seconds": seconds,
        "planned_step_seconds": plan.prediction.get("step_seconds"),
    }
