"""One strategy of a report: what was predicted for it and what was measured, read from the report's document.

The document of a report (`page.render`) is a JSON object:

    kind           run, runs, compare, simulate, plan, verify, validate or calibrate
    title          name of the workload, or of what the page is about
    entries        one object for each strategy or run, read by `Entry`
    cluster        name, devices and links of the cluster; see `predict` for its links
    comparison     the document of `compare --json`
    plan           the document of `plan --json`
    verification, validation, calibration   the documents of these commands
    what_if        predictions over devices, bandwidth and batch; see `commands.what_if`
    rejected       strategies that cannot be, with the reason
    commands       command lines that reproduce what is shown
    facts          versions and further facts: pairs of name and value
    notes          remarks, among them what could not be read
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardwise.errors import StrategyError
from shardwise.reports.page.colours import MEMORY
from shardwise.reports.page.intervals import mean_parts
from shardwise.reports.page.values import Document, mapping, number, numbers, objects, text
from shardwise.strategy import Strategy


@dataclass(frozen=True)
class Entry:
    """Reader of one entry of a report's document.

    label           name in the page
    strategy        spelling of the strategy
    folder          folder of its run
    request         run.json
    summary         summary.json
    steps           list of the steps in metrics.jsonl
    evaluations     list of the evaluations in metrics.jsonl
    prediction      prediction.json, or {candidate, timeline, model} of a simulation
    ranks           lines of ranks.jsonl
    timeline        timeline.json
    memory          memory.json
    by_hand         whether it is a plain loop beside a strategy
    samples         seconds of a step, one for each time that it was measured
    failure         why it has no measurement
    reasons         what is missing -> why
    """

    content: Document

    @property
    def label(self) -> str:
        """Return the name of the entry."""
        return text(self.content, "label") or self.strategy

    @property
    def strategy(self) -> str:
        """Return the spelling of the strategy."""
        return text(self.content, "strategy") or text(self.request, "strategy") or text(self.summary, "strategy")

    @cached_property
    def parsed(self) -> Strategy | None:
        """Return the strategy as a value. Returns None if this version does not know its spelling."""
        try:
            return Strategy.parse(self.strategy)
        except StrategyError:
            return None

    @property
    def request(self) -> Document:
        """Return the request of the run; empty if there is no run."""
        return mapping(self.content, "request")

    @property
    def summary(self) -> Document:
        """Return the summary of the run; empty if it has none."""
        return mapping(self.content, "summary")

    @property
    def candidate(self) -> Document:
        """Return the prediction of the strategy as `simulate --json` gives it; empty if there is none."""
        return mapping(self.content, "prediction", "candidate")

    @property
    def model(self) -> Document:
        """Return how the model was cut; empty if that is not known."""
        return mapping(self.content, "prediction", "model")

    @cached_property
    def predicted_rows(self) -> list[Document]:
        """Return the rows of the predicted timeline."""
        return objects(self.content, "prediction", "timeline")

    @cached_property
    def measured_rows(self) -> list[Document]:
        """Return the rows of the measured timeline."""
        return objects(self.content, "timeline", "rows")

    @cached_property
    def steps(self) -> list[Document]:
        """Return the steps of the run."""
        return objects(self.content, "steps")

    @cached_property
    def evaluations(self) -> list[Document]:
        """Return the evaluations of the run."""
        return objects(self.content, "evaluations")

    @cached_property
    def ranks(self) -> list[Document]:
        """Return the measurements of all ranks, one object a step; steps that a profiler slowed down are left out."""
        return [line for line in objects(self.content, "ranks") if line.get("profiled") is not True]

    @property
    def workers(self) -> int | None:
        """Return the number of workers. Returns None if it is not known."""
        for source in (self.summary, self.request):
            found = number(source, "workers")
            if found is not None:
                return int(found)
        return self.parsed.workers if self.parsed else None

    @property
    def failure(self) -> str:
        """Return why the strategy was not measured; empty if it was, or was not to be."""
        return text(self.content, "failure")

    @property
    def was_run(self) -> bool:
        """Return whether this is a run, not a prediction alone."""
        return bool(self.request) or bool(self.summary) or bool(self.steps) or bool(self.samples)

    @property
    def by_hand(self) -> bool:
        """Return whether this is a plain loop that was measured beside a strategy."""
        return self.content.get("by_hand") is True

    @property
    def ended(self) -> bool:
        """Return whether the run wrote its summary."""
        return bool(self.summary)

    @property
    def predicted_seconds(self) -> float | None:
        """Return the predicted seconds of a step. Returns None without a prediction."""
        found = number(self.candidate, "step_seconds")
        return number(self.summary, "predicted_seconds") if found is None else found

    @cached_property
    def samples(self) -> list[float]:
        """Return the measured seconds of a step, one for each time that it was measured."""
        found = [each for each in numbers(self.content, "samples") if each is not None and each > 0]
        return found or self._step_seconds()[1:] or self._step_seconds()

    def _step_seconds(self) -> list[float]:
        found = [number(step, "seconds") for step in self.steps]
        return [seconds for seconds in found if seconds]

    @cached_property
    def measured_seconds(self) -> float | None:
        """Return the median of the measured seconds of a step. Returns None if none was measured."""
        given = number(self.content, "measured_seconds")
        found = number(self.summary, "step_seconds") if given is None else given
        return found or (statistics.median(self.samples) if self.samples else None)

    @cached_property
    def spread(self) -> tuple[float, float] | None:
        """Return the quartiles of the measured seconds. Returns None if they were measured fewer than four times."""
        if len(self.samples) < 4:
            return None
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def samples_per_second(self) -> float | None:
        """Return the measured throughput, else that of the median step. Returns None if no step was timed."""
        found = number(self.content, "measured_rate") or number(self.summary, "samples_per_second")
        if found is not None or self.measured_seconds is None:
            return found
        sizes = [size for step in self.steps if (size := number(step, "samples"))]
        return statistics.median(sizes) / self.measured_seconds if sizes else None

    @cached_property
    def predicted_parts(self) -> dict[str, float]:
        """Return the parts of the predicted step in seconds, with exposed communication by axis where it is known.

        The timeline tells how exposed communication is divided among the axes; without one, a strategy of one axis has
        only that.
        """
        if not self.candidate:
            return {}
        found = {
            name: number(self.candidate, f"{name}_seconds") or 0.0
            for name in ("compute", "optimizer", "host", "bubble")
        }
        exposed = number(self.candidate, "exposed_communication_seconds") or 0.0
        for axis, share in self._axis_shares().items():
            found[axis] = found.get(axis, 0.0) + exposed * share
        return {name: seconds for name, seconds in found.items() if seconds > 0}

    def _axis_shares(self) -> dict[str, float]:
        parts = mean_parts(self.predicted_rows)
        axes = {name: seconds for name, seconds in parts.items() if name not in ("compute", "optimizer", "waiting")}
        if axes:
            return {axis: seconds / sum(axes.values()) for axis, seconds in axes.items()}
        names = axes_of(self.parsed) if self.parsed else []
        return {names[0] if len(names) == 1 else "communication": 1.0}

    @cached_property
    def measured_parts(self) -> dict[str, float]:
        """Return the parts of the measured step in seconds; empty if only its length was measured.

        The profiled step says how a step is divided; without one, the summary tells waiting from computing.
        """
        seconds = self.measured_seconds
        if seconds is None:
            return {}
        parts = mean_parts(self.measured_rows)
        if parts:
            total = sum(parts.values())
            return {name: value / total * seconds for name, value in parts.items()}
        waiting = number(self.summary, "communication_share")
        if waiting is None:
            return {}
        return {"compute": (1 - waiting) * seconds, "waiting": waiting * seconds}

    @property
    def parts(self) -> dict[str, float]:
        """Return the parts of the step: the measured ones, else the predicted ones."""
        return self.measured_parts or self.predicted_parts

    @property
    def memory_by_rank(self) -> list[float]:
        """Return the measured peak memory of each rank in bytes; empty if it was not measured."""
        found = [value for value in numbers(self.summary, "memory_bytes_by_worker") if value is not None]
        return found or [peak for peak, _ in self.memory_categories]

    @cached_property
    def memory_categories(self) -> list[tuple[float, dict[str, float]]]:
        """Return (peak bytes, bytes by category) of each rank as it was measured; empty if it was not."""
        found = []
        for rank in objects(self.content, "memory", "ranks"):
            parts = {name: value for name in MEMORY if (value := number(rank, f"{name}_bytes")) is not None}
            peak = number(rank, "peak_bytes")
            found.append((sum(parts.values()) if peak is None else peak, parts))
        return found

    @property
    def first_step(self) -> Document:
        """Return the comparison of the first step with one process; empty if it was not made."""
        return mapping(self.summary, "first_step")

    def reason(self, what: str, otherwise: str) -> str:
        """Return why something is missing, as its document says."""
        return text(self.content, "reasons", what) or otherwise


def axes_of(strategy: Strategy) -> list[str]:
    """Return the axes along which a strategy splits: those of degree above 1."""
    return [axis for axis in strategy.axes if getattr(strategy, axis) > 1]


def entries_of(document: Mapping[str, Any]) -> list[Entry]:
    """Return the entries of a report's document."""
    return [Entry(each) for each in objects(document, "entries")]
