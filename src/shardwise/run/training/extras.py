"""Files of a run's folder that reports read, beside its metrics; a run never fails because of one.

prediction.json   what was predicted, and how the model was cut; written before the first step
ranks.jsonl       seconds of each step on each worker, see `rank_times`
timeline.json     one profiled step on all workers, see `measured_step`
memory.json       measured peak of each worker, and what parameters, gradients and optimizer take of it
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.errors import ShardwiseError
from shardwise.launch import regroup
from shardwise.parallel.program import Program
from shardwise.predict.timeline.rows import MOST_ROWS, longest
from shardwise.run.control_group import Workers
from shardwise.run.jsonfile import replace_file
from shardwise.run.training.cut_model import cut_model
from shardwise.run.training.job import Job
from shardwise.run.training.log import finite
from shardwise.run.training.metrics import Sampler
from shardwise.run.training.rank_times import RankTimes
from shardwise.run.training.run_folder import MEMORY, PREDICTION, RANKS, TIMELINE

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""File in which Linux names this start of the system: workers that read the same share one monotonic clock."""


@dataclass(slots=True)
class Extras:
    """Extra files of a run on each of its workers; rank 0 writes. All methods are collective.

    Attributes:
        program: the program that trains.
        job: the job, which has a folder.
        folder: that folder.
        workers: the workers, with a process group of their own.
        warn: prints a line for the user.
        times: times of the steps of all workers.
    """

    program: Program
    job: Job
    folder: Path
    workers: Workers
    warn: Callable[[str], None]
    times: RankTimes = field(init=False)
    _held: dict[str, int] = field(init=False, default_factory=dict)
    _warned: bool = field(init=False, default=False)

    def begin(self, done: int) -> None:
        """Write the prediction, and open `ranks.jsonl` for the steps after step `done`."""
        self.times = RankTimes(self.workers, self.program.mesh.device.type != "cpu")
        model = cut_model(self.program, self.workers)
        if self.workers.rank != 0:
            return
        self._write(PREDICTION, _prediction(self.job, model))
        with self._warning():
            self.times.write_to(self.folder / RANKS, done)

    def step(self, number: int, sampler: Sampler, *, profiled: bool, last_profiled: bool) -> None:
        """Note that step `number` is over.

        Args:
            number: number of the step, from 1.
            sampler: what was measured of the profiled steps so far.
            profiled: whether this step was profiled.
            last_profiled: whether it was the last one to be profiled.
        """
        apart = self.program.strategy.stale and regroup.generation() > 0  # workers went on from different steps
        if apart or regroup.lost():  # nothing is exchanged before the workers meet again
            return
        try:
            self._exchange(number, sampler, profiled=profiled, last_profiled=last_profiled)
        except RuntimeError as error:
            if not regroup.expected(error):
                raise

    def _exchange(self, number: int, sampler: Sampler, *, profiled: bool, last_profiled: bool) -> None:
        with self._warning():
            self.times.add(number, profiled=profiled, computed=sampler.computed if profiled else None)
        if profiled:
            self._held = self.program.held_bytes()
        if last_profiled:
            self._write_timeline(number, sampler)
            self._write_memory(sampler.peak_memory())
            sampler.rows = []

    def end(self, peak: int) -> None:
        """Write the rest. `peak` is the peak memory of this worker in bytes."""
        with self._warning():
            self.times.close()
        self._held = self._held or self.program.held_bytes()
        self._write_memory(peak)

    def abandon(self) -> None:
        """Close the files of a run that ends early; not collective."""
        with self._warning():
            self.times.abandon()

    def _write_timeline(self, step: int, sampler: Sampler) -> None:
        rows, left_out = longest(sampler.rows, MOST_ROWS // self.workers.count)
        boot = BOOT.read_text().strip() if BOOT.exists() else socket.gethostname()
        seconds = sampler.spent[-1].step
        mine = {"boot": boot, "begin": sampler.begin, "seconds": seconds, "left_out": left_out, "rows": rows}
        everybodys = [json.loads(text) for text in self.workers.exchange(json.dumps(mine))]
        if self.workers.rank == 0:
            self._write(TIMELINE, _timeline(step, everybodys))

    def _write_memory(self, peak: int) -> None:
        rest = max(0, peak - sum(self._held.values()))
        mine = {"peak_bytes": peak, **{f"{name}_bytes": count for name, count in {**self._held, "rest": rest}.items()}}
        everybodys = [json.loads(text) for text in self.workers.exchange(json.dumps(mine))]
        if self.workers.rank != 0:
            return
        gpu = self.program.mesh.device.type != "cpu"
        ranks = [{"rank": rank, **each} for rank, each in enumerate(everybodys)]
        measured = "tensors that torch has allocated on the GPU" if gpu else "process without mapped files"
        self._write(MEMORY, {"measured": measured, "ranks": ranks})

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with self._warning():
            replace_file(self.folder / name, (json.dumps(finite(dict(content))) + "\n").encode())

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Turn an error of writing a file into a warning, one for all files of a run."""
        try:
            yield
        except (OSError, ShardwiseError) as error:
            if not self._warned:
                said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
                self.warn(f"{said}; the run goes on without the files that only reports read")
            self._warned = True


def _prediction(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of what was predicted, and of how the model was cut."""
    forecast = job.forecast
    if not forecast.details:
        reason = forecast.reason or "the step alone was predicted"
        return {"strategy": str(job.strategy), "reason": reason, "model": dict(model)}
    parts = {name: value for name, value in forecast.details.items() if name != "segments"}
    model = {"segments": forecast.details["segments"], **model}
    return {"strategy": str(job.strategy), **parts, "model": model}


def _timeline(step: int, workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the document of a profiled step from what each worker has measured of it.

    Workers of one system share a clock. Others are laid beside each other by the end of the step, when all of them have
    received the same message.
    """
    shared = len({each["boot"] for each in workers}) == 1
    begins = [each["begin"] if shared else -each["seconds"] for each in workers]
    first = min(begins)
    rows = [
        {"process": f"rank {rank}", "rank": rank, **row, "start_seconds": row["start_seconds"] + begin - first}
        for rank, (each, begin) in enumerate(zip(workers, begins, strict=True))
        for row in each["rows"]
    ]
    return {
        "step": step,
        "clocks": "one clock for all workers" if shared else "aligned by the end of the step",
        "seconds": [each["seconds"] for each in workers],
        "left_out": sum(each["left_out"] for each in workers),
        "rows": rows,
    }
