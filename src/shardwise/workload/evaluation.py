"""Measurement on held-out data, and the rule that ends a training by it.

Importing this module does not import torch.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shardwise.errors import WorkloadError, nearest


class Metric(Protocol):
    """Object that collects what a metric needs, in the manner of torchmetrics: for metrics that are no mean."""

    def update(self, output: Any, batch: Any) -> Any:
        """Take in the model's output for a batch of held-out samples."""
        ...

    def compute(self) -> Any:
        """Return the metric over everything taken in, a number or a tensor with one element."""
        ...

    def reset(self) -> Any:
        """Forget everything taken in."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Measurement on held-out data.

    Attributes:
        dataset: map-style dataset of held-out samples, of the kind the workload trains on.
        metric: name under which the value is reported, for example `accuracy`.
        measure: function of (model output, batch) that returns a scalar tensor, the mean over the samples of `batch`;
            or, for a metric that is no mean, a class or a function without arguments that makes a `Metric`.
        batch_size: samples per evaluation batch over all workers; 0 means the workload's.
        higher_is_better: whether a larger value means a better model.
        name: name of this evaluation if a workload has several; the values of all but the first are reported as
            `name/loss` and `name/<metric>`.
        every: optimizer steps between two evaluations; 0 means after each epoch. The last step is always evaluated.
    """

    dataset: Any
    metric: str
    measure: Callable[..., Any]
    batch_size: int = 0
    higher_is_better: bool = True
    name: str = ""
    every: int = 0

    def __post_init__(self) -> None:
        what = f"of evaluation {self.name or self.metric!r}"
        if not isinstance(self.metric, str) or not self.metric:
            raise WorkloadError(f"metric={self.metric!r} of an evaluation: must be the name of a value, like accuracy")
        if not isinstance(self.name, str) or "/" in self.name:
            raise WorkloadError(f"name={self.name!r} {what}: must be a text without /")
        if not callable(self.measure) and not _is_metric(self.measure):
            raise WorkloadError(f"measure {what} must be a function of (output, batch), not {self.measure!r}")
        for field in ("batch_size", "every"):
            value = getattr(self, field)
            if type(value) is not int or value < 0:
                raise WorkloadError(f"{field}={value!r} {what}: must be a whole number, 0 or more")

    @property
    def collects(self) -> bool:
        """Return whether `measure` makes an object that collects outputs, instead of being a mean over samples."""
        return _is_metric(self.measure) or _is_factory(self.measure)

    def collector(self) -> Metric:
        """Return an object that has taken in nothing. Only for an evaluation that `collects`.

        Raises:
            WorkloadError: the object is not such a one.
        """
        made: Any = copy.deepcopy(self.measure) if _is_metric(self.measure) else self.measure()
        missing = [name for name in ("update", "compute", "reset") if not callable(getattr(made, name, None))]
        if missing:
            raise WorkloadError(
                f"measure of evaluation {self.name or self.metric!r} takes no arguments, so it must return an object "
                f"with update(output, batch), compute() and reset(): {type(made).__name__} has no {missing[0]}"
            )
        found: Metric = made
        found.reset()
        return found


def _is_metric(measure: Any) -> bool:
    return not inspect.isclass(measure) and all(
        callable(getattr(measure, name, None)) for name in ("update", "compute", "reset")
    )


def _is_factory(measure: Any) -> bool:
    """Return whether a class, or a function that needs no argument, was given in place of a function of two."""
    if inspect.isclass(measure):
        return True
    if not isinstance(measure, functools.partial) and not inspect.isroutine(measure):
        return False
    try:
        given = inspect.signature(measure).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    if isinstance(measure, functools.partial) and inspect.isclass(measure.func):
        return True
    return not any(p.kind is p.VAR_POSITIONAL or (p.kind is not p.VAR_KEYWORD and p.default is p.empty) for p in given)


@dataclass(frozen=True, slots=True)
class ReportedValue:
    """Value that an evaluation reports: the key, and whether a larger one is better."""

    key: str
    higher_is_better: bool


def values_of(evaluations: Sequence[Evaluation], number: int) -> tuple[ReportedValue, ReportedValue]:
    """Return the loss and the metric that evaluation `number` reports."""
    evaluation = evaluations[number]
    prefix = f"{evaluation.name}/" if number else ""
    return ReportedValue(f"{prefix}loss", False), ReportedValue(
        f"{prefix}{evaluation.metric}", evaluation.higher_is_better
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Rule that ends a training early: a value has not improved for some evaluations in a row.

    Attributes:
        metric: key of the value, as an evaluation reports it: `loss`, its metric, or `name/<metric>` of a further one.
        patience: number of evaluations in a row without an improvement after which the training ends.
        min_delta: smallest change that counts as an improvement.
    """

    metric: str
    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if type(self.patience) is not int or self.patience < 1:
            raise WorkloadError(f"patience={self.patience!r} of stop: must be a whole number, 1 or more")
        if not isinstance(self.min_delta, int | float) or not 0 <= self.min_delta < float("inf"):
            raise WorkloadError(f"min_delta={self.min_delta!r} of stop: must be a number, 0 or more")


def check_evaluations(evaluations: Sequence[Any], stop: Stopping | None) -> None:
    """Check that evaluations can be told apart, and that the training can be stopped by what they report.

    Raises:
        WorkloadError: they are of another kind, or two report the same, or none reports what `stop` looks at.
    """
    for evaluation in evaluations:
        if not isinstance(evaluation, Evaluation):
            raise WorkloadError(f"evaluation must be an Evaluation or several, not {evaluation!r}")
    names = [evaluation.name for evaluation in evaluations]
    for number, name in enumerate(names):
        if number and not name:
            raise WorkloadError(f"evaluation {number + 1} ({evaluations[number].metric!r}) has no name: give it one")
        if name in names[:number]:
            raise WorkloadError(f"two evaluations have the name {name!r}: give each its own")
    if stop is None:
        return
    known = [value.key for number in range(len(evaluations)) for value in values_of(evaluations, number)]
    if not isinstance(stop, Stopping):
        raise WorkloadError(f"stop must be a Stopping, not {stop!r}")
    if stop.metric not in known:
        listed = f"reported are {', '.join(dict.fromkeys(known))}{nearest(stop.metric, known)}"
        raise WorkloadError(f"stop by {stop.metric!r}: {listed if known else 'there is no evaluation'}")
