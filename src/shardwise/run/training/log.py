"""Log of a run: a progress bar, `metrics.jsonl`, `messages.jsonl`, and the trackers that were chosen."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shardwise.errors import ShardwiseError
from shardwise.run.training.messages import add_message
from shardwise.run.training.metrics_file import MetricsFile
from shardwise.run.training.result import Step
from shardwise.run.training.run_folder import METRICS
from shardwise.run.training.tracking.tracker import Tracker
from shardwise.units import format_rate

MEMORY_SECONDS = 5.0
"""Seconds between two readings of the peak memory, see `Log`."""


class Log:
    """Log of a run, written by rank 0 only; a context manager.

    Args:
        folder: the run's folder; None: nothing is written to disk.
        title: text at the start of the progress bar.
        done: number of steps before this log begins.
        total: number of steps at the end; None: unknown.
        quiet: show no progress bar.
        trackers: what gets all numbers too; they are closed with the log.
        peak_memory: function that returns the peak memory of this worker in bytes, which is noted now and then.
    """

    def __init__(
        self,
        folder: Path | None,
        title: str,
        done: int,
        total: int | None,
        *,
        quiet: bool,
        trackers: Sequence[Tracker] = (),
        peak_memory: Callable[[], int] | None = None,
    ) -> None:
        self._folder = folder
        self._file = None if folder is None else MetricsFile(folder / METRICS, done)
        self._trackers = trackers
        self._peak_memory, self._looked = peak_memory, time.monotonic()
        tqdm.monitor_interval = 0  # keeps tqdm from starting a thread
        self._bar = tqdm(
            desc=title,
            initial=done,
            total=total,
            unit="step",
            disable=quiet,
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )

    def step(self, step: Step) -> None:
        """Log a step whose numbers are complete."""
        record: dict[str, Any] = {
            "step": step.step,
            "epoch": step.epoch,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": step.gradient_norm,
            "samples": step.samples,
            "seconds": step.seconds,
            "samples_per_second": step.samples_per_second,
        }
        scalars = {key: value for key, value in record.items() if key not in ("step", "epoch", "samples")}
        record["time"] = round(time.time(), 3)
        if step.losses:
            record["losses"] = dict(step.losses)
            scalars.update({f"loss/{name}": value for name, value in step.losses.items()})
        self._write(record)
        values = {name: float(value) for name, value in scalars.items() if value is not None}
        for tracker in self._trackers:
            tracker.step(step.step, values)
        self._note_memory(step.step)
        speed = "" if step.samples_per_second is None else f", {format_rate(step.samples_per_second)} samples/s"
        self._bar.set_postfix_str(f"loss {step.loss:.4g}{speed}", refresh=False)
        self._bar.update()

    def evaluation(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values measured on held-out data after `step`."""
        record = {"step": step, "epoch": epoch, "evaluation": dict(values)}
        self._write(record)
        for tracker in self._trackers:
            tracker.evaluation(step, {f"evaluation/{name}": float(value) for name, value in values.items()})

    def say(self, line: str, *, always: bool = False) -> None:
        """Print a line above the progress bar, and note it. Without a progress bar it is printed only if `always`."""
        self.note("warning" if always else "note", text=line)
        if always or not self._bar.disable:
            self._bar.clear()
            sys.stderr.write(line + "\n")
            self._bar.refresh()

    def note(self, kind: str, **fields: Any) -> None:
        """Add a line to the messages of the run, see `messages`."""
        if self._folder is not None:
            add_message(self._folder, kind, **fields)

    def _note_memory(self, step: int) -> None:
        now = time.monotonic()
        if self._peak_memory is not None and now > self._looked + MEMORY_SECONDS:
            self._looked = now
            self.note("memory", step=step, bytes=self._peak_memory())

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(finite(record))

    def sync(self) -> None:
        """Wait until all lines of metrics.jsonl are on disk. Raises ShardwiseError."""
        if self._file is not None:
            self._file.sync()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)
        if self._file is not None:
            with contextlib.suppress(*((ShardwiseError,) if error else ())):  # the first error is the one to report
                self._file.close()


def finite(value: Any) -> Any:
    """Return a copy of a JSON-able value in which None replaces infinities and nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
