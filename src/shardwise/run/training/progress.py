"""Progress of a training: where it is, what was evaluated, which evaluation was the best, and whether to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardwise.errors import CheckpointError
from shardwise.run.checkpoint.restored import unlike
from shardwise.run.jsonfile import short
from shardwise.workload.evaluation import ReportedValue, values_of
from shardwise.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a training, which is saved in checkpoints.

    Attributes:
        batch_size: global batch size, which decides the samples of each batch together with `seed`.
        seed: seed of the data order.
        epoch: epoch of the next batch.
        batch: number of the next batch in its epoch.
        loss: loss of the last step; None if it is not known.
        metrics: last values of all evaluations.
        evaluated: name of an evaluation, empty for the first -> step after which it was last made.
        finite: True if weights and loss were finite.
        skipped_steps: number of steps whose update was not applied.
        best: `value` of the first evaluation's metric where it was best, with the `step` and all `metrics` of then;
            empty before the first evaluation.
        stopping: best `value` of what the training is stopped by, and the number of evaluations `waited` since.
    """

    batch_size: int
    seed: int
    epoch: int = 0
    batch: int = 0
    loss: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    finite: bool = True
    skipped_steps: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    stopping: dict[str, Any] = field(default_factory=dict)

    def due(self, workload: Workload, step: int, *, epoch_ends: bool, last: bool = False) -> list[int]:
        """Return the numbers of the evaluations to make after `step` that have not been made after it yet.

        The evaluation that a schedule follows is made after each epoch too.
        """
        found = []
        for number, evaluation in enumerate(workload.evaluations):
            by_epochs = not evaluation.every or (number == 0 and workload.schedule_every == "metric")
            by_steps = evaluation.every > 0 and step % evaluation.every == 0
            wanted = last or by_steps or (epoch_ends and by_epochs)
            if step and wanted and self.evaluated.get(_label(workload, number)) != step:
                found.append(number)
        return found

    def with_values(self, workload: Workload, numbers: list[int], step: int, values: Mapping[str, float]) -> Progress:
        """Return the progress after the evaluations `numbers` gave `values` after `step`."""
        metrics = {**self.metrics, **values}
        evaluated = {**self.evaluated, **{_label(workload, number): step for number in numbers}}
        found = replace(self, metrics=metrics, evaluated=evaluated)
        judged = values_of(workload.evaluations, 0)[1]
        if 0 in numbers and _better(values[judged.key], self.best.get("value"), judged):
            found = replace(found, best={"value": values[judged.key], "step": step, "metrics": metrics})
        stop = workload.stop
        if stop is None or stop.metric not in values:
            return found
        value = values[stop.metric]
        if _better(value, self.stopping.get("value"), _named(workload, stop.metric), stop.min_delta):
            return replace(found, stopping={"value": value, "waited": 0})
        return replace(found, stopping={**self.stopping, "waited": self.stopping.get("waited", 0) + 1})

    def stopped(self, workload: Workload) -> bool:
        """Return whether the workload's rule ends the training early."""
        return workload.stop is not None and self.stopping.get("waited", 0) >= workload.stop.patience


LATER_FIELDS = {"evaluated", "finite", "skipped_steps", "best", "stopping"}
"""Fields that checkpoints of earlier versions lack."""


def _label(workload: Workload, number: int) -> str:
    return workload.evaluations[number].name if number else ""


def _named(workload: Workload, key: str) -> ReportedValue:
    numbers = range(len(workload.evaluations))
    return next(value for n in numbers for value in reversed(values_of(workload.evaluations, n)) if value.key == key)


def _better(value: float, than: float | None, judged: ReportedValue, least: float = 0.0) -> bool:
    """Return whether a value improves on an earlier one by more than `least`; one that is not finite never does."""
    if not math.isfinite(value) or than is None:
        return math.isfinite(value)
    return (value - than if judged.higher_is_better else than - value) > least


def restored(saved: dict[str, Any], fresh: Progress, steps: int) -> Progress:
    """Return the progress in a checkpoint after a check of its values; fields of LATER_FIELDS may be missing.

    Raises:
        CheckpointError: the progress is not such as a training saves.
    """
    if type(before := saved.get("evaluated")) is int:  # earlier versions had one evaluation
        saved = {**saved, "evaluated": {"": before}}
    problem = _problem(asdict(fresh), saved)
    if problem:
        raise CheckpointError(f"the checkpoint of step {steps} is damaged: {problem}")
    ended = not saved.get("batch")  # the checkpoint was written after the evaluation at the end of an epoch
    return replace(fresh, **{"evaluated": {"": steps} if ended else {}, **saved})


def _problem(known: dict[str, Any], saved: dict[str, Any]) -> str:
    """Return one line on the first invalid value of a saved progress. Returns an empty string if all are valid."""
    if odd := sorted((saved.keys() ^ known.keys()) - LATER_FIELDS):
        return f"progress has {short(odd[0])}" if odd[0] in saved else f"progress has no {odd[0]}"
    held = {name: saved.get(name) for name in ("loss", "metrics", "evaluated", "best", "stopping")}
    for name, value in _leaves("progress", held):
        if value is not None and type(value) not in (int, float):
            return f"{short(name)} is {short(value)}"
    for part, name in (("best", "step"), ("stopping", "waited")):
        if saved.get(part) and isinstance(saved[part], dict) and type(saved[part].get(name)) is not int:
            return f"{name} of {part} is {short(saved[part].get(name))}"
    for name in ("epoch", "batch"):
        if type(saved[name]) is not int or saved[name] < 0:
            return f"{name} is {short(saved[name])}"
    return unlike(known, saved, "progress")


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the values in nested dicts, each with its key."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, entry in value.items():
        yield from _leaves(key, entry)
