"""Comparison of trainings of one workload under several strategies, measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.commands.report_files import COMPARISON
from shardwise.launch.signals import Terminated
from shardwise.run.jsonfile import write_json
from shardwise.run.training.in_turns import TrainingInTurns, Turns, slice_steps
from shardwise.run.training.job import Job
from shardwise.run.training.log import finite
from shardwise.run.training.result import Step, relative_error
from shardwise.run.training.run_folder import told_writing
from shardwise.workload.reading.loader import Loader
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    from shardwise.run.calibration.reference import Reference

REFERENCE = "reference"
"""Name of the reference training, see `run.calibration.reference`."""

COMPARED_STEPS = 20
"""Number of first steps whose losses are compared with those of one worker."""

LEAST_SAMPLES = 4
"""Number of slices from which on a spread says something."""


class ComparisonInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a comparison. `document` has what was measured until then."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self.document = document


class ComparisonTerminated(Terminated):
    """A signal ended a comparison. `document` has what was measured until then."""

    def __init__(self, code: Any, document: dict[str, Any]) -> None:
        super().__init__(code)
        self.document = document


def compared(
    workload: Workload,
    jobs: Sequence[Job],
    refused: Sequence[tuple[str, str]],
    *,
    auto: str | None,
    threads: int,
    gpus: bool,
    by_hand: bool,
    reference: Reference | None,
    out: Path,
    quiet: bool,
) -> dict[str, Any]:
    """Train all jobs in turns, and return the document of `compare`; see `api.compare`.

    Raises:
        ShardwiseError: all strategies failed; the error is that of the first.
        ComparisonInterrupted, ComparisonTerminated: it was told to end.
    """
    steps = _total(jobs[0], workload)
    jobs = [replace(job, slice_steps=slice_steps(steps)) for job in jobs]
    ours = [Turns(job, str(job.strategy)) for job in jobs]
    hands, without = _by_hand(workload, ours) if by_hand else ([], [])
    order = [each for one in ours for each in (one, *(hand for hand in hands if hand.job.strategy == one.job.strategy))]
    paced = reference_turns(reference, steps, gpus=gpus)
    order += [each for each in (paced,) if each is not None]
    training = TrainingInTurns(order, steps=steps, threads=threads, gpus=gpus, quiet=quiet)

    def document(*, interrupted: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = finite(
            comparison(
                ours,
                hands,
                refused,
                workload=workload.name,
                threads=threads,
                groups=training.groups,
                no_hand=without,
                pace=pace_of(reference, paced),
                interrupted=interrupted,
            )
            | {"auto": auto}
        )
        with told_writing(out / COMPARISON):
            write_json(out / COMPARISON, found)
        return found

    try:
        training.run()
    except KeyboardInterrupt:
        raise ComparisonInterrupted(document(interrupted=True)) from None
    except Terminated as ended:
        raise ComparisonTerminated(ended.code, document(interrupted=True)) from None
    found = document()
    errors = [each.error for each in ours if each.error is not None]
    if len(errors) == len(ours):
        raise errors[0]
    return found


def _total(job: Job, workload: Workload) -> int | None:
    """Return the steps of a training. Returns None if the length of an epoch is not known."""
    loading = workload.loading
    loader = Loader(dataset=workload.dataset, batch_size=workload.batch_size, seed=workload.seed, loading=loading)
    return job.options.total(loader.batches) if loading.chooser is None else job.options.steps


def reference_turns(reference: Reference | None, steps: int | None, *, gpus: bool) -> Turns | None:
    """Return the reference training with as many turns as the trainings have.

    Returns None where trainings take no turns, or nobody knows how many.
    """
    if reference is None or steps is None or gpus:
        return None
    from shardwise.run.calibration.reference import train_reference

    return Turns(reference.job(-(-steps // slice_steps(steps))), REFERENCE, train_reference)


def pace_of(reference: Reference | None, paced: Turns | None) -> float | None:
    """Return how much longer the machine took for the reference than while it was measured. None: not known."""
    if reference is None or paced is None:
        return None
    return reference.pace(samples(paced.steps, paced.job.slice_steps))


def _by_hand(workload: Workload, ours: Sequence[Turns]) -> tuple[list[Turns], list[tuple[str, str]]]:
    """Return the plain loops that take turns with our strategies, and (strategy, reason) of those without one."""
    from shardwise.run.training.by_hand import NAMES, refusal, train_by_hand

    hands, without = [], []
    for each in ours:
        strategy = each.job.strategy
        reason = refusal(workload, strategy)
        if reason is None:
            name = f"{NAMES['dp' if strategy.dp > 1 else 'fsdp']}, {strategy.workers} workers"
            hands.append(Turns(replace(each.job, folder=None), name, train_by_hand))
        elif strategy.workers > 1:
            without.append((each.name, reason))
    return hands, without


def comparison(
    trainings: Sequence[Turns],
    by_hand: Sequence[Turns],
    refused: Sequence[tuple[str, str]],
    *,
    workload: str,
    threads: int,
    groups: Sequence[Sequence[str]],
    no_hand: Sequence[tuple[str, str]] = (),
    pace: float | None = None,
    interrupted: bool = False,
) -> dict[str, Any]:
    """Return the document that `compare --json` prints.

    Args:
        trainings: the trainings under the strategies. The first one with one worker is the baseline of the others.
        by_hand: plain loops that took turns with them.
        refused: (strategy, reason) of strategies that this workload does not support.
        workload: name of the workload.
        threads: intra-op threads of each worker.
        groups: names of the trainings that took turns with each other.
        no_hand: (strategy, reason) of strategies beside which there is no plain loop.
        pace: time that the machine took for the reference training, over that while it was measured; None: not known.
        interrupted: whether the comparison was ended before its end.
    """
    base = next((each for each in trainings if each.job.strategy.workers == 1 and not each.failed), None)
    results = [_row(each, base, pace) for each in trainings]
    timed = [row for row in results if row["measured_seconds"] is not None and not row["failed"]]
    fastest = min(timed, key=lambda row: row["measured_seconds"], default=None)
    predicted = [row for row in results if row["predicted_seconds"] is not None]
    chosen = min(predicted, key=lambda row: row["predicted_seconds"], default=None)
    unpredicted = [each.job.forecast.reason for each in trainings if each.job.forecast.seconds is None]
    reasons = {"predicted_seconds": "; ".join(dict.fromkeys(unpredicted))} if unpredicted else {}
    if chosen is None:
        reasons["chosen"] = reasons["regret"] = reasons["predicted_seconds"]
    if base is None:
        reasons["speedup"] = reasons["loss_difference"] = "no strategy with one worker to compare with"
    equal = _equal(timed, fastest)
    if equal is None:
        reasons["equal"] = f"a spread takes {LEAST_SAMPLES} slices after the first, which warms up: train longer"
    sliced = {each.name: samples(each.steps, each.job.slice_steps) for each in (*trainings, *by_hand)}
    return {
        "workload": workload,
        "workers": max(row["workers"] for row in results),
        "threads": threads,
        "results": results,
        "by_hand": [_row(each, base, pace) | _beside(each, trainings) for each in by_hand],
        "rejected": [{"strategy": strategy, "reason": reason} for strategy, reason in refused],
        "not_by_hand": [{"strategy": strategy, "reason": reason} for strategy, reason in no_hand],
        "chosen": chosen and chosen["strategy"],
        "fastest": fastest and fastest["strategy"],
        "equal": equal,
        "regret": _regret(chosen, fastest),
        "pace": pace,
        "slice_steps": trainings[0].job.slice_steps,
        "rounds": max(map(len, sliced.values())),
        "samples": sliced,
        "groups": [list(group) for group in groups],
        "interrupted": interrupted,
        "reasons": reasons,
    }


def samples(steps: Sequence[Step], size: int) -> list[float]:
    """Return the seconds of a step in each slice of `size` steps: the median of those that count.

    The first slice counts only if there is no other, and the first timed step of a slice only if it is the only one.
    """
    slices = [steps[first : first + size] for first in range(0, len(steps), size)]
    timed = [[step.seconds for step in each if step.seconds] for each in slices]
    found = [statistics.median(seconds[1:] or seconds) for seconds in timed if seconds]
    return found[1:] or found


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the lower and upper quartile. Returns (None, None) of too few values."""
    if len(values) < LEAST_SAMPLES:
        return None, None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _row(each: Turns, base: Turns | None, pace: float | None) -> dict[str, Any]:
    """Return the row of a training; what it has not come to is None."""
    summary = {} if each.trained is None else each.trained.summary
    job, last = each.job, each.steps[-1] if each.steps else None
    values = samples(each.steps, job.slice_steps)
    seconds = statistics.median(values) if values else None
    low, high = spread(values)
    memory = summary.get("memory_bytes", each.memory_bytes)
    return {
        "strategy": each.name,
        "workers": job.strategy.workers,
        "steps": summary.get("steps", len(each.steps)),
        "predicted_seconds": job.forecast.seconds,
        "low_seconds": job.forecast.details.get("candidate", {}).get("low_seconds"),
        "high_seconds": job.forecast.details.get("candidate", {}).get("high_seconds"),
        "measured_seconds": seconds,
        "low": low,
        "high": high,
        "spread_seconds": None if low is None or high is None else high - low,
        "error": relative_error(job.forecast.seconds, seconds),
        "error_at_pace": relative_error(_times(job.forecast.seconds, pace), seconds),
        "predicted_memory_bytes": job.forecast.memory_bytes,
        "measured_memory_bytes": memory,
        "memory_error": relative_error(job.forecast.memory_bytes, memory),
        "loss": summary.get("loss", last and last.loss),
        "first_not_finite_step": summary.get("first_not_finite_step"),
        "metrics": summary.get("metrics", {}),
        "samples_per_second": _rate(each.steps, seconds),
        "alpha": summary.get("alpha"),
        "exposed_alpha": summary.get("exposed_alpha"),
        "communication_share": summary.get("communication_share"),
        "speedup": base and _ratio(_typical_rate(each), _typical_rate(base)),
        "loss_difference": base and loss_difference(each.steps, base.steps),
        "run": None if job.folder is None else str(job.folder),
        "notes": summary.get("notes", []),
        "failed": each.failed or None,
    }


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _beside(each: Turns, trainings: Sequence[Turns]) -> dict[str, Any]:
    """Return which strategy a plain loop stands beside, and what that strategy takes over the loop: 0.01 is 1% more."""
    ours = next(other for other in trainings if other.job.strategy == each.job.strategy)
    sizes = each.job.slice_steps
    mine, theirs = samples(ours.steps, sizes), samples(each.steps, sizes)
    # slice by slice, which are neighbours in time
    ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
    return {"beside": ours.name, "overhead": statistics.median(ratios) - 1.0 if ratios else None}


def _equal(timed: Sequence[dict[str, Any]], fastest: dict[str, Any] | None) -> list[str] | None:
    """Return the strategies whose spread overlaps that of the fastest, with it. Returns None without spreads."""
    if fastest is None or fastest["high"] is None:
        return None
    return [row["strategy"] for row in timed if row["low"] is not None and row["low"] <= fastest["high"]]


def _rate(steps: Sequence[Step], seconds: float | None) -> float | None:
    """Return the samples per second of steps of `seconds`."""
    return statistics.median(step.samples for step in steps) / seconds if seconds and steps else None


def _typical_rate(each: Turns) -> float | None:
    values = samples(each.steps, each.job.slice_steps)
    return _rate(each.steps, statistics.median(values) if values else None)


def _regret(chosen: dict[str, Any] | None, fastest: dict[str, Any] | None) -> float | None:
    """Return the relative extra time of the strategy that was predicted to be fastest over the measured fastest.

    Returns None if one of them is not known.
    """
    if chosen is None or fastest is None or chosen["measured_seconds"] is None:
        return None
    return float(chosen["measured_seconds"] / fastest["measured_seconds"] - 1.0)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def loss_difference(steps: Sequence[Step], base: Sequence[Step]) -> float | None:
    """Return the largest relative difference of losses over the first steps. Returns None if none is finite."""
    pairs = list(zip(steps[:COMPARED_STEPS], base[:COMPARED_STEPS], strict=False))
    differences = [abs(ours.loss - theirs.loss) / max(abs(theirs.loss), 1e-30) for ours, theirs in pairs]
    return max((each for each in differences if isfinite(each)), default=None)
