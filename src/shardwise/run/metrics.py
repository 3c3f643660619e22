"""What a run measures: the time of its steps, the share of it spent communicating, and memory.

    alpha = communication / compute           all of the time in which a collective is under way
    exposed alpha = exposed / compute         only the part in which nothing is computed meanwhile
    compute = step - exposed                  so that step = compute x (1 + exposed alpha)

Steps are timed one by one; a few of them are profiled instead and not timed, for profiling slows them down.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from shardwise.parallel.pipeline import WAIT
from shardwise.run.memory import give_back, peak_memory, restart_peak
from shardwise.run.result import Step

Interval = tuple[float, float]

SETTLED = 3
"""Steps of a run before the first that is profiled: by then everything has been allocated."""

PROFILED = 2
"""Steps that are profiled, where the run is long enough."""


MESSAGES = ("gloo:recv", "gloo:send", "c10d::recv", "c10d::send")
"""Events of messages between pipeline stages."""


@dataclass(slots=True)
class _Pending:
    step: Step
    loss: Tensor
    gradient_norm: Tensor | None
    timed: bool


class Clock:
    """Turns losses on the device into steps with their times.

    Reading a number from a GPU waits for it. There each loss is read one step late: the device is then busy with the
    step after, and the times between two readings are those of the device's steps. On the CPU it is read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 0 if device.type == "cpu" else 1
        self._pending: deque[_Pending] = deque()
        self._mark = time.perf_counter()

    def add(self, step: Step, loss: Tensor, gradient_norm: Tensor | None, *, timed: bool = True) -> list[Step]:
        """Takes a step without its numbers, and returns those that are complete by now."""
        self._pending.append(_Pending(step, loss, gradient_norm, timed))
        return self._complete(self._lag)

    def drain(self) -> list[Step]:
        """All steps that are left, complete; the time from here to `resume` belongs to no step."""
        return self._complete(0)

    def resume(self) -> None:
        """The next step begins now."""
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
        )


def typical(steps: Sequence[Step]) -> tuple[float | None, float | None]:
    """Medians of seconds per step and of samples per second; the first step, which warms up, counts only if alone."""
    timed = [step for step in steps if step.seconds]
    timed = timed[1:] or timed
    if not timed:
        return None, None
    rates = [step.samples_per_second or 0.0 for step in timed]
    return statistics.median(step.seconds or 0.0 for step in timed), statistics.median(rates)


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of the sampled steps of one worker: all, with a collective under way, and with nothing but that."""

    step: float
    communication: float
    exposed: float


def sampled_steps(planned: int | None) -> range:
    """Which steps, from 0, of a run of `planned` steps are profiled (None: many); none of a run below three steps."""
    if planned is None or planned >= SETTLED + PROFILED + 1:
        return range(SETTLED, SETTLED + PROFILED)
    return range(planned - 1, planned) if planned >= 3 else range(0)


@dataclass(slots=True)
class Sampler:
    """Profiles some of the steps of this worker.

    Attributes:
        device: where it computes.
        steps: numbers of the steps to profile.
        spent: what was found, one entry per profiled step.
        peak: bytes that this worker had used at most before a step was profiled: what the profiler keeps of a step is
            no part of the training's memory.
    """

    device: torch.device
    steps: range
    spent: list[Spent] = field(default_factory=list)
    peak: int = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds step `number`."""
        if number not in self.steps:
            yield
            return
        before = peak_memory(self.device)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints that it starts and stops
        gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
            begin = self._now()
            yield
            seconds = self._now() - begin
        communication, exposed = communicating(profiler.events() or [], self.device)
        self.spent.append(Spent(seconds, communication, min(exposed, seconds)))
        del profiler
        self._forget(before)

    def _forget(self, before: int) -> None:
        """Takes what the profiler needed out of the peak, where the system can."""
        if self.device.type == "cuda":  # it keeps nothing there
            return
        give_back()
        if restart_peak():
            self.peak = max(self.peak, before)

    def peak_memory(self) -> int:
        """Bytes that this worker has used at most."""
        return max(self.peak, peak_memory(self.device))

    def total(self) -> Spent | None:
        """The sum over the profiled steps; None where there are none."""
        if not self.spent:
            return None
        return Spent(
            sum(spent.step for spent in self.spent),
            sum(spent.communication for spent in self.spent),
            sum(spent.exposed for spent in self.spent),
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def communicating(events: Iterable[FunctionEvent], device: torch.device) -> tuple[float, float]:
    """Seconds in which a collective is under way, and those of them in which nothing is computed."""
    communication: list[Interval] = []
    messages: list[Interval] = []
    waits: list[Interval] = []
    compute: list[Interval] = []
    for event in events:
        interval = (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        if device.type == "cuda":
            if event.device_type.name == "CUDA":
                (communication if "nccl" in event.name.lower() else compute).append(interval)
        elif event.name == WAIT:
            waits.append(interval)
        elif event.name.startswith(MESSAGES):
            messages.append(interval)
        elif event.name.startswith(("gloo:", "c10d::", "_c10d_functional::")):
            communication.append(interval)
        elif event.name.startswith("aten::") and not event.cpu_children and not event.is_async:
            compute.append(interval)  # only the innermost: what encloses them may wait for others in between
    collectives, waiting = merged(communication), merged(waits)
    exposed = length(collectives) - overlap(collectives, merged(compute))
    # a message is posted long before it is needed: only waiting for it costs time
    exposed += length(waiting) - overlap(waiting, collectives)
    return length(merged([*communication, *messages, *waits])), exposed


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as intervals in order that do not touch."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Total length of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Length of what two lists of merged intervals have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def summarize(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all workers measured, as one: keys memory_bytes (the largest), alpha, exposed_alpha, communication_share.

    Each entry of `measured` is one worker's, see `measure`. Times are means over the workers.
    """
    memory = [worker["memory_bytes"] for worker in measured]
    result: dict[str, Any] = {"memory_bytes": max(memory), "memory_bytes_by_worker": memory}
    spent = [Spent(*worker["spent"]) for worker in measured if worker["spent"]]
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
    """What this worker measured, JSON-able."""
    spent = sampler.total()
    return {
        "memory_bytes": sampler.peak_memory(),
        "spent": spent and [spent.step, spent.communication, spent.exposed],
    }
