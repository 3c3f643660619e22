"""Measurements of a run: step times, the share of time spent communicating, and memory.

    alpha = communication / compute           all time in which a collective is in flight
    exposed alpha = exposed / compute         only the part that does not overlap compute
    compute = step - exposed                  so that step = compute x (1 + exposed alpha)

Steps are timed one by one. A few of them are profiled instead and not timed, because profiling slows them down.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from shardwise.launch import waiting
from shardwise.launch.shared_memory.choice import EVENTS
from shardwise.parallel.pipeline.executor import WAIT
from shardwise.predict.timeline.rows import Row
from shardwise.run.training.measured_step import MARK, step_rows
from shardwise.run.training.process_memory import give_back, only_new_garbage, peak_memory, restart_peak
from shardwise.run.training.result import Step

Interval = tuple[float, float]

SETTLED = 3
"""Number of steps before the first profiled one: by then all memory has been allocated."""

PROFILED = 2
"""Number of profiled steps, if the run is long enough."""


MESSAGES = ("gloo:recv", "gloo:send", f"{EVENTS}recv", f"{EVENTS}send", "c10d::recv", "c10d::send")
"""Prefixes of the profiler's events for messages between pipeline stages."""

COLLECTIVES = ("gloo:", EVENTS, "c10d::", "_c10d_functional::")
"""Prefixes of the profiler's events for all that is sent."""


@dataclass(slots=True)
class _Pending:
    step: Step
    loss: Tensor
    gradient_norm: Tensor | None
    losses: Mapping[str, Tensor]
    timed: bool


class TrainingClock:
    """Clock of the training: turns losses on the device into steps with their times.

    Reading a number from a GPU waits for the GPU. There each loss is read one step late: the device is then busy with
    the next step, and the time between two readings is that of a step on the device. On a CPU it is read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 0 if device.type == "cpu" else 1
        self._pending: deque[_Pending] = deque()
        self._mark = time.perf_counter()

    def add(
        self,
        step: Step,
        loss: Tensor,
        gradient_norm: Tensor | None,
        losses: Mapping[str, Tensor],
        *,
        timed: bool = True,
    ) -> list[Step]:
        """Add a step whose loss and norm are still on the device; return the steps that are complete by now.

        Args:
            step: the step, without loss, gradient norm and seconds.
            loss: its loss on the device.
            gradient_norm: its gradient norm on the device; None if it is not known.
            losses: its losses by name on the device, if there are several.
            timed: whether to keep its time; profiled steps are not timed.
        """
        self._pending.append(_Pending(step, loss, gradient_norm, losses, timed))
        return self._complete(self._lag)

    def drain(self) -> list[Step]:
        """Return all remaining steps, completed; the time from here to `resume` belongs to no step."""
        return self._complete(0)

    def resume(self) -> None:
        """Start the time of the next step now."""
        self._mark = time.perf_counter()

    def _complete(self, left: int) -> list[Step]:
        return [self._read(self._pending.popleft()) for _ in range(len(self._pending) - left)]

    def _read(self, pending: _Pending) -> Step:
        step, norm = pending.step, pending.gradient_norm
        loss = pending.loss.item()
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return Step(
            step.step,
            step.epoch,
            loss,
            step.learning_rate,
            None if norm is None else norm.item(),
            step.samples,
            seconds if pending.timed else None,
            {name: part.item() for name, part in pending.losses.items()},
        )


def typical(steps: Sequence[Step], every: int = 1) -> tuple[float | None, float | None]:
    """Return the medians of seconds per step and of samples per second. Returns (None, None) if no step was timed.

    The first timed step is a warm-up: it counts only if it is the only one.

    Args:
        steps: steps of a run.
        every: number of steps that make a round, such as local steps and the average after them: medians are those of
            the means of whole rounds, as far as there are any.
    """
    timed = [step for step in steps if step.seconds]
    timed = timed[1:] or timed
    if not timed:
        return None, None
    rounds: dict[int, list[Step]] = {}
    for step in timed:
        rounds.setdefault((step.step - 1) // max(every, 1), []).append(step)
    whole = [each for each in rounds.values() if len(each) == every] or [[step] for step in timed]
    seconds = [statistics.fmean(step.seconds or 0.0 for step in each) for each in whole]
    rates = [sum(step.samples for step in each) / (mean * len(each)) for each, mean in zip(whole, seconds, strict=True)]
    return statistics.median(seconds), statistics.median(rates)


@dataclass(frozen=True, slots=True)
class ProfiledSeconds:
    """Seconds in the profiled steps of one worker: total, with a collective in flight, and exposed communication."""

    step: float
    communication: float
    exposed: float


def sampled_steps(planned: int | None) -> range:
    """Return the steps to profile, counted from 0, in a run of `planned` steps (None: many).

    Runs of fewer than three steps are not profiled.
    """
    if planned is None or planned >= SETTLED + PROFILED + 1:
        return range(SETTLED, SETTLED + PROFILED)
    return range(planned - 1, planned) if planned >= 3 else range(0)


@dataclass(slots=True)
class Sampler:
    """Profiler of some steps of this worker.

    Attributes:
        device: device of the worker.
        steps: numbers of the steps to profile.
        spent: measurements, one entry per profiled step.
        peak: peak memory in bytes before a profiled step. The profiler's own memory is no part of the training's, so
            the system's peak is reset after each profiled step.
        rows: the last profiled step as a timeline, see `measured_step`.
        begin: when it began, in seconds of this host's monotonic clock.
        computed: seconds in which a kernel ran that is no collective, in the last profiled step.
    """

    device: torch.device
    steps: range
    spent: list[ProfiledSeconds] = field(default_factory=list)
    peak: int = 0
    rows: list[Row] = field(default_factory=list)
    begin: float = 0.0
    computed: float | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number` in the block, and profile it if it is one of `steps`."""
        if number not in self.steps:
            yield
            return
        before = peak_memory(self.device)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints that it starts and stops
        gpu = self.device.type == "cuda"
        with only_new_garbage():
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
            # acc_events: else torch warns on a GPU
            with profile(activities=activities, acc_events=True) as profiler, waiting.recorded() as waits:
                begin = self._now()
                with record_function(MARK):
                    yield
                seconds = self._now() - begin
            events = profiler.events() or []
            communication, exposed = communicating(events, self.device)
            exposed = min(exposed, seconds)
            self.spent.append(ProfiledSeconds(seconds, communication, exposed))
            self.computed = seconds - exposed
            if number == self.steps[-1]:
                self.begin, self.rows = begin, step_rows(events, waits, begin, self.device)
            del profiler, events
            self._forget(before)

    def _forget(self, before: int) -> None:
        """Remove the profiler's memory from the peak, if the system can reset it."""
        if self.device.type == "cuda":  # the profiler keeps nothing in GPU memory
            return
        give_back()
        if restart_peak():
            self.peak = max(self.peak, before)

    def peak_memory(self) -> int:
        """Return the peak memory of this worker in bytes, without the profiler's."""
        return max(self.peak, peak_memory(self.device))

    def total(self) -> ProfiledSeconds | None:
        """Return the sum over the profiled steps. Returns None if there are none."""
        if not self.spent:
            return None
        return ProfiledSeconds(
            sum(spent.step for spent in self.spent),
            sum(spent.communication for spent in self.spent),
            sum(spent.exposed for spent in self.spent),
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def communicating(events: Iterable[FunctionEvent], device: torch.device) -> tuple[float, float]:
    """Return the seconds with a collective or message in flight, and the exposed seconds: those without compute.

    A point-to-point message is exposed only while its receiver waits for it.
    """
    communication: list[Interval] = []
    messages: list[Interval] = []
    waits: list[Interval] = []
    compute: list[Interval] = []
    for event in events:
        interval = (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        if device.type == "cuda":
            # a range that the program names covers the kernels inside it, and the pauses between them
            if event.device_type.name == "CUDA" and not event.is_user_annotation:
                (communication if "nccl" in event.name.lower() else compute).append(interval)
        elif event.name == WAIT:
            waits.append(interval)
        elif event.name.startswith(MESSAGES):
            messages.append(interval)
        elif event.name.startswith(COLLECTIVES):
            communication.append(interval)
        elif event.name.startswith("aten::") and not (event.cpu_children or event.is_async or _within_message(event)):
            compute.append(interval)  # only innermost operations: enclosing ones may wait for others in between
    collectives, waiting = merged(communication), merged(waits)
    exposed = length(collectives) - overlap(collectives, merged(compute))
    # a message is posted long before it is needed: only the wait for it costs time
    exposed += length(waiting) - overlap(waiting, collectives)
    return length(merged([*communication, *messages, *waits])), exposed


def _within_message(event: FunctionEvent) -> bool:
    """Return whether an operation copies or adds what is sent through shared memory."""
    outer = event.cpu_parent
    while outer is not None:
        if outer.name.startswith(EVENTS):
            return True
        outer = outer.cpu_parent
    return False


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as a sorted list of intervals that do not touch."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Return the total length of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Return the length of the intersection of two lists of merged intervals."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def summarize(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the measurements of all workers (see `measure`), which are given by rank.

    Returns:
        memory_bytes (the largest), memory_bytes_by_worker, alpha, exposed_alpha and communication_share. The last three
        are ratios of sums over the workers: 0 for a single worker, None if no step was profiled.
    """
    memory = [worker["memory_bytes"] for worker in measured]
    result: dict[str, Any] = {"memory_bytes": max(memory), "memory_bytes_by_worker": memory}
    spent = [ProfiledSeconds(*worker["spent"]) for worker in measured if worker["spent"]]
    if len(measured) == 1:
        return {**result, "alpha": 0.0, "exposed_alpha": 0.0, "communication_share": 0.0}
    if not spent:
        return {**result, "alpha": None, "exposed_alpha": None, "communication_share": None}
    step, exposed = sum(worker.step for worker in spent), sum(worker.exposed for worker in spent)
    communication, compute = sum(worker.communication for worker in spent), max(step - exposed, 1e-9)
    return {
        **result,
        "alpha": communication / compute,
        "exposed_alpha": exposed / compute,
        "communication_share": exposed / step,
    }


def measure(sampler: Sampler) -> dict[str, Any]:
    """Return the measurements of this worker as a JSON-able dict: memory_bytes, and spent (None if not profiled)."""
    spent = sampler.total()
    return {
        "memory_bytes": sampler.peak_memory(),
        "spent": spent and [spent.step, spent.communication, spent.exposed],
    }
