"""Log of a run: a progress bar, `metrics.jsonl`, and TensorBoard files if TensorBoard is installed."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shardwise.errors import ShardwiseError
from shardwise.run.training.metrics_file import MetricsFile
from shardwise.run.training.result import Step
from shardwise.run.training.run_folder import METRICS, TENSORBOARD
from shardwise.run.training.tensorboard import EventFile
from shardwise.units import format_rate


class Log:
    """Log of a run, written by rank 0 only; a context manager.

    Args:
        folder: the run's folder; None: nothing is written to disk.
        title: text at the start of the progress bar.
        done: number of steps before this log begins.
        total: number of steps at the end; None: unknown.
        quiet: show no progress bar.
    """

    def __init__(self, folder: Path | None, title: str, done: int, total: int | None, *, quiet: bool) -> None:
        self._file = None if folder is None else MetricsFile(folder / METRICS, done)
        self._board = None if folder is None else EventFile(folder / TENSORBOARD, done)
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
        if step.losses:
            record["losses"] = dict(step.losses)
            scalars.update({f"loss/{name}": value for name, value in step.losses.items()})
        self._write(record, scalars)
        speed = "" if step.samples_per_second is None else f", {format_rate(step.samples_per_second)} samples/s"
        self._bar.set_postfix_str(f"loss {step.loss:.4g}{speed}", refresh=False)
        self._bar.update()

    def evaluation(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values measured on held-out data after `step`."""
        record = {"step": step, "epoch": epoch, "evaluation": dict(values)}
        self._write(record, {f"evaluation/{name}": value for name, value in values.items()})

    def say(self, line: str, *, always: bool = False) -> None:
        """Print a line above the progress bar. Without a progress bar it is printed only if `always` is set."""
        if always or not self._bar.disable:
            self._bar.clear()
            sys.stderr.write(line + "\n")
            self._bar.refresh()

    def _write(self, record: dict[str, Any], scalars: Mapping[str, float | None]) -> None:
        if self._file is not None:
            self._file.write(finite(record))
        if self._board is not None:
            self._board.add(record["step"], scalars)

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
        if self._board is not None:
            self._board.close()
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
