"""Follower of a run: its state as a document, from the files in its folder alone.

It works while the run goes on, on another machine that sees the folder, and after the run ended in whatever way. The
lock of the folder tells whether a process still trains: the kernel releases it when its holder dies.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from shardwise.errors import RunFolderError, one_line
from shardwise.run.checkpoint.folder import complete, step_of
from shardwise.run.jsonfile import entry, read_json
from shardwise.run.live.curve import Curve
from shardwise.run.live.json_lines import JsonLines
from shardwise.run.training.lock import is_locked
from shardwise.run.training.messages import ENDS, FINISHED, MESSAGES, STOPPED
from shardwise.run.training.result import relative_error
from shardwise.run.training.run_folder import (
    CHECKPOINTS,
    DESCRIPTION,
    MEMORY,
    METRICS,
    MOST_BYTES,
    RANKS,
    SUMMARY,
    last_request,
    read_run,
)

STARTING, RUNNING, KILLED, UNKNOWN = "starting", "running", "killed", "unknown"
"""States of a run besides its ends (`messages.ENDS`): no step yet, in training, ended without a word, not known."""

GOING_ON = (STARTING, RUNNING, UNKNOWN)

RECENT = 100
"""Number of steps whose times are averaged."""

RECENT_RANKS = 20
"""Number of lines of `ranks.jsonl` that are averaged."""

WARNINGS = 5
"""Number of warnings that are kept."""

_RANKS_BYTES = 1 << 21


class Follower:
    """Reader of the state of one run; each call reads only what is new.

    Args:
        folder: the run's folder.

    Raises:
        RunFolderError: the folder holds no run, or its description is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise RunFolderError(f"{folder}: there is no such folder: give the folder of a run, such as runs/NAME")
        if not (folder / DESCRIPTION).exists():
            raise RunFolderError(
                f"{folder} holds no run: it has no {DESCRIPTION}; give the folder of a run, such as runs/NAME"
            )
        self._folder = folder
        self._description = read_run(folder)
        self._metrics, self._messages = JsonLines(folder / METRICS), JsonLines(folder / MESSAGES)
        self._ranks = JsonLines(folder / RANKS, _RANKS_BYTES)
        self._begin_metrics()
        self._begin_messages()
        self._busy: deque[tuple[bool, list[float]]] = deque(maxlen=RECENT_RANKS)

    def states(self, every: float) -> Iterator[dict[str, Any]]:
        """Yield the state now, and again every `every` seconds until the run has ended."""
        while True:
            state = self.state()
            yield state
            if state["state"] not in GOING_ON:
                return
            time.sleep(every)

    def state(self) -> dict[str, Any]:
        """Return the state of the run as a JSON-able document; `api.watch` explains its fields."""
        locked = is_locked(self._folder)  # first: who sees the lock free must find how the run ended
        self._read()
        request, begun = last_request(self._description), self._begun
        total = begun.get("total_steps", request["steps"])
        summary = self._summary()
        state = self._judged(locked, summary)
        seconds, rate = self._speed()
        predicted = _number(begun, "predicted_seconds")
        memory = _numbers(summary.get("memory_bytes_by_worker")) if state in (FINISHED, STOPPED) else self._peaks()
        return {
            "run": str(self._folder),
            "workload": one_line(request["workload"]),
            "strategy": one_line(request["strategy"]),
            "workers": request.get("workers"),
            "state": state,
            "text": one_line(str(self._end.get("text", ""))) if state in ENDS else "",
            "step": self._step,
            "total_steps": total if isinstance(total, int) else None,
            "epoch": self._last.get("epoch"),
            "epochs": request["epochs"],
            "seconds_left": self._left(total) if state == RUNNING else None,
            "seconds_since_step": self._since() if state in GOING_ON else None,
            "loss": _number(self._last, "loss"),
            "losses": self._losses.points(),
            "first_not_finite_step": self._first_not_finite,
            "learning_rate": _number(self._last, "learning_rate"),
            "gradient_norm": _number(self._last, "gradient_norm"),
            "evaluation": self._evaluation,
            "samples_per_second": rate,
            "step_seconds": seconds,
            "predicted_seconds": predicted,
            "error": relative_error(predicted, seconds),
            "busy_seconds": self._busy_seconds(),
            "memory_bytes": max(memory, default=self._memory),
            "memory_bytes_by_worker": memory or None,
            "predicted_memory_bytes": _number(begun, "predicted_memory_bytes"),
            "checkpoint": self._checkpoint(),
            "warnings": list(self._warnings),
        }

    def _begin_metrics(self) -> None:
        """Forget all metrics: a resume has written their file anew."""
        self._step = 0
        self._last: dict[str, Any] = {}
        self._losses = Curve()
        self._first_not_finite: int | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._evaluation: dict[str, Any] | None = None

    def _begin_messages(self) -> None:
        """Forget all messages: another training begins, or their file was written anew."""
        self._heard = False
        self._begun: dict[str, Any] = {}
        self._end: dict[str, Any] = {}
        self._memory: float | None = None
        self._warnings: deque[dict[str, Any]] = deque(maxlen=WARNINGS)

    def _read(self) -> None:
        """Read what is new in all files."""
        with contextlib.suppress(RunFolderError):  # it was whole when the follower was made
            self._description = read_run(self._folder)
        if self._messages.replaced():
            self._begin_messages()
        for message in self._messages.new():
            self._hear(message)
        if self._metrics.replaced():
            self._begin_metrics()
        for record in self._metrics.new():
            self._take(record)
        if self._ranks.replaced():
            self._busy.clear()
        for record in self._ranks.new():
            if busy := _numbers(record.get("busy_seconds")):
                self._busy.append((bool(record.get("profiled")), busy))

    def _hear(self, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        if self._end and kind != "end":  # the first word of a training after the one that ended
            self._begin_messages()
        self._heard = True
        if kind == "begin":
            self._begun, self._memory = dict(message), None
        elif kind == "end" and message.get("how") in ENDS:
            self._end = dict(message)
        elif kind == "memory":
            self._memory = _number(message, "bytes")
        elif kind == "warning":
            self._warnings.append({"time": _number(message, "time"), "text": one_line(str(message.get("text", "")))})

    def _take(self, record: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl: a step or an evaluation."""
        step = record.get("step")
        if type(step) is not int:
            return
        if isinstance(values := record.get("evaluation"), dict):
            self._evaluation = {"step": step, "values": {one_line(name): _number(values, name) for name in values}}
        if "loss" not in record:
            return
        self._step, self._last = step, record
        self._recent.append(record)
        loss = _number(record, "loss")
        if loss is not None:
            self._losses.add(loss)
        elif self._first_not_finite is None:
            self._first_not_finite = step

    def _judged(self, locked: bool | None, summary: Mapping[str, Any]) -> str:
        """Return the state of the run: one of GOING_ON, of ENDS, or KILLED."""
        if self._end and not self._resumed_since():
            return str(self._end["how"])
        if locked:
            return RUNNING if self._begun and not self._end else STARTING
        if summary and not self._heard:  # a run of an earlier version, which wrote no messages
            return STOPPED if summary.get("stopped") else FINISHED
        return KILLED if locked is False else UNKNOWN

    def _resumed_since(self) -> bool:
        """Return whether the run was resumed after the end that was noted last."""
        resumed = last_request(self._description).get("resumed")
        ended = _number(self._end, "time")
        try:
            return ended is not None and datetime.fromisoformat(str(resumed)).timestamp() > ended
        except (ValueError, OverflowError):  # it was never resumed
            return False

    def _summary(self) -> dict[str, Any]:
        try:
            summary = read_json(self._folder / SUMMARY, MOST_BYTES, RunFolderError, "summary")
        except RunFolderError:
            return {}
        return summary if isinstance(summary, dict) else {}

    def _of_this_training(self) -> list[dict[str, Any]]:
        """Return the recent steps without those before the last resume."""
        begin = _number(self._begun, "time") or 0.0
        return [record for record in self._recent if (_number(record, "time") or math.inf) >= begin]

    def _speed(self) -> tuple[float | None, float | None]:
        """Return the medians of seconds per step and of samples per second over the recent steps, as a summary does."""
        timed = [record for record in self._of_this_training() if _number(record, "seconds")]
        timed = timed[1:] or timed
        if not timed:
            return None, None
        seconds = [_number(record, "seconds") or 0.0 for record in timed]
        rates = [_number(record, "samples_per_second") or 0.0 for record in timed]
        return statistics.median(seconds), statistics.median(rates)

    def _left(self, total: object) -> float | None:
        """Return the seconds that the rest of the training takes at the recent pace, with evaluations and checkpoints.

        Returns None if the number of steps is not known, or fewer than two steps were taken.
        """
        recent = self._of_this_training()
        if not isinstance(total, int) or len(recent) < 2:
            return None
        first, last = (_number(record, "time") for record in (recent[0], recent[-1]))
        steps = recent[-1]["step"] - recent[0]["step"]
        if first is None or last is None or steps < 1:
            return None
        pace: float = (last - first) / steps
        return max(0.0, pace * (total - self._step) - (self._since() or 0.0))

    def _since(self) -> float | None:
        """Return the seconds since the last step, or since the training began. Returns None if neither is known."""
        last = max(
            (_number(each, "time") or 0.0 for each in (self._begun, *self._of_this_training()[-1:])), default=0.0
        )
        return max(0.0, time.time() - last) if last else None

    def _busy_seconds(self) -> list[float] | None:
        """Return the mean seconds of a step that each rank is busy, by rank. Returns None if nothing was recorded.

        The profiler slows a step down: profiled steps count only if there are no others, as on GPUs.
        """
        usual = [busy for profiled, busy in self._busy if not profiled] or [busy for _, busy in self._busy]
        if not usual:
            return None
        alike = [busy for busy in usual if len(busy) == len(usual[-1])]  # a resume may change the number of workers
        return [statistics.fmean(column) for column in zip(*alike, strict=True)]

    def _peaks(self) -> list[float]:
        """Return the peak memory by rank that this training has written so far, in bytes; empty if it has not."""
        path = self._folder / MEMORY
        try:
            if path.stat().st_mtime < (_number(self._begun, "time") or math.inf):
                return []
            ranks = entry(read_json(path, MOST_BYTES, RunFolderError, "memory"), "ranks", list)
            return _numbers([entry(rank, "peak_bytes", int) for rank in ranks])
        except (OSError, RunFolderError, ValueError):
            return []

    def _checkpoint(self) -> dict[str, Any] | None:
        """Return step and age of the newest complete checkpoint. Returns None if there is none."""
        try:
            newest = next(iter(complete(self._folder / CHECKPOINTS)), None)
            if newest is None:
                return None
            return {"step": step_of(newest), "seconds_ago": max(0.0, time.time() - newest.stat().st_mtime)}
        except OSError:  # it has just been deleted
            return None


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _numbers(values: object) -> list[float]:
    """Return a list of finite numbers as it is, and an empty list for anything else."""
    if not isinstance(values, list):
        return []
    numbers = [_number({"": value}, "") for value in values]
    return [number for number in numbers if number is not None] if None not in numbers else []
