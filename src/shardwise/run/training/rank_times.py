"""File `ranks.jsonl` of a run: seconds of each step on each worker, and the part in which it waited for nobody.

    {"step": 7, "busy_seconds": [0.101, 0.043], "seconds": [0.105, 0.105]}

In a synchronous step all workers take equally long, but the one that the others wait for is busy for all of it. Workers
exchange their times in one message for many steps, which nobody waits for: it is read when the next one is sent.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch import waiting
from shardwise.run.control_group import Workers
from shardwise.run.training.metrics_file import MetricsFile

MOST_STEPS = 64
"""Largest number of steps in one message."""

FIRST_STEPS = 4
"""Number of steps in a message before the time of a step is known."""

EVERY_SECONDS = 1.0
"""Seconds between two messages, as far as `MOST_STEPS` allows."""


@dataclass(frozen=True, slots=True)
class _Message:
    """Times of some steps on their way between the workers.

    Attributes:
        steps: numbers of the steps, and whether each was profiled.
        parts: for each worker, busy seconds and seconds of each step; nan if they were not measured.
        work: handle of the message; None for a single worker.
    """

    steps: list[tuple[int, bool]]
    parts: list[Tensor]
    work: Any


@dataclass(slots=True)
class RankTimes:
    """Times of the steps on all workers. `add` and `close` are collective.

    Attributes:
        workers: the workers, with a process group that nothing else uses meanwhile.
        gpu: whether workers compute on GPUs, where waits are seen in profiled steps alone.
    """

    workers: Workers
    gpu: bool
    _file: MetricsFile | None = field(init=False, default=None)
    _steps: list[tuple[int, bool]] = field(init=False, default_factory=list)
    _times: list[tuple[float, float]] = field(init=False, default_factory=list)
    _sent: _Message | None = field(init=False, default=None)
    _length: int = field(init=False, default=FIRST_STEPS)
    _usual: float = field(init=False, default=0.0)
    _mark: float = field(init=False, default_factory=time.perf_counter)
    _waited: float = field(init=False, default_factory=waiting.waited)

    def write_to(self, path: Path, done: int) -> None:
        """Open the file, whose lines after step `done` are of a run that this one replaces; on rank 0.

        Raises:
            RequestError, ShardwiseError: it cannot be written.
        """
        self._file = MetricsFile(path, done)

    def resume(self) -> None:
        """Start the time of the next step now."""
        self._mark, self._waited = time.perf_counter(), waiting.waited()

    def add(self, step: int, *, profiled: bool = False, computed: float | None = None) -> None:
        """Note that `step` ends now, and start the time of the next one.

        Args:
            step: number of the step, from 1.
            profiled: whether the profiler slowed it down.
            computed: seconds of its kernels on a GPU, if it was profiled.

        Raises:
            ShardwiseError: the file cannot be written; what follows is not written then.
        """
        now, waited = time.perf_counter(), waiting.waited()
        seconds = now - self._mark
        busy = (nan if computed is None else computed) if self.gpu else max(0.0, seconds - (waited - self._waited))
        self._steps.append((step, profiled))
        self._times.append((busy, seconds))
        self._mark, self._waited = now, waited
        if len(self._steps) >= self._length:
            self._exchange()
        elif self._file is not None and self._sent is not None and self._arrived(self._sent):
            self._read()

    def close(self) -> None:
        """Exchange and write the remaining times. Raises ShardwiseError."""
        try:
            if self._steps:
                self._exchange()
            self._read()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file; times that were not exchanged are lost."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _exchange(self) -> None:
        """Read the last message and send the next."""
        try:
            self._read()
        finally:  # the others send theirs, too, whatever became of the file
            mine = torch.tensor(self._times, dtype=torch.float64)
            parts = [torch.empty_like(mine) for _ in range(self.workers.count)] if self.workers.count > 1 else [mine]
            work = None
            if self.workers.count > 1:
                work = dist.all_gather(parts, mine, group=self.workers.group, async_op=True)
            self._sent = _Message(self._steps, parts, work)
            self._steps, self._times = [], []
            if self._usual:  # of the first worker's times in the message before, so that all choose alike
                self._length = max(1, min(MOST_STEPS, int(EVERY_SECONDS / self._usual)))

    @staticmethod
    def _arrived(message: _Message) -> bool:
        return message.work is None or bool(message.work.is_completed())

    def _read(self) -> None:
        """Wait for the message that is on its way, if any; choose the length of the next, and write its times."""
        message, self._sent = self._sent, None
        if message is None:
            return
        if message.work is not None:
            message.work.wait()
        by_rank: list[list[list[float]]] = [part.tolist() for part in message.parts]
        self._usual = statistics.median(seconds for _, seconds in by_rank[0])
        file = self._file
        if file is None:
            return
        try:
            for (step, profiled), times in zip(message.steps, zip(*by_rank, strict=True), strict=True):
                file.write(_line(step, times, profiled=profiled))
        except (RequestError, ShardwiseError):
            self._file = None
            raise


def _line(step: int, times: tuple[list[float], ...], *, profiled: bool) -> dict[str, Any]:
    busy = [None if isnan(each) else round(each, 7) for each, _ in times]
    line: dict[str, Any] = {"step": step, "busy_seconds": busy, "seconds": [round(each, 7) for _, each in times]}
    return line | ({"profiled": True} if profiled else {})
