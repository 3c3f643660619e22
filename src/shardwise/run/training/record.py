"""Record of a run: the timing, logs, evaluation, checkpoints and final summary around the training loop."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor

from shardwise.errors import blamed
from shardwise.launch import gate, regroup, waiting, watch
from shardwise.launch.join import crowding
from shardwise.launch.shared_memory.backend import used
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.folder import final_path, step_of
from shardwise.run.control_group import Workers
from shardwise.run.training.extras import Extras
from shardwise.run.training.guard import Guard
from shardwise.run.training.job import GO, Job
from shardwise.run.training.join_point import JoinPoint, can_go_on
from shardwise.run.training.log import Log, finite
from shardwise.run.training.messages import add_message
from shardwise.run.training.metrics import Sampler, TrainingClock, measure, sampled_steps, summarize, typical
from shardwise.run.training.progress import Progress
from shardwise.run.training.result import NO_STEP, FirstStep, Step, Trained, relative_error
from shardwise.run.training.run_folder import write_summary
from shardwise.run.training.tracking.choice import open_trackers
from shardwise.run.training.tracking.tracker import TrackedRun, Tracker

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """Step in progress; the training loop sets its loss."""

    loss: Tensor | None = None


@dataclass(slots=True)
class RunRecord:
    """Record of one run on each of its workers: rank 0 logs and times, all take part in checkpoints and summary."""

    program: Program
    job: Job
    first_step: FirstStep = NO_STEP
    join_point: JoinPoint = field(default_factory=JoinPoint)
    _checkpoints: Checkpoints | None = field(init=False, default=None)
    _log: Log | None = field(init=False, default=None)
    _clock: TrainingClock = field(init=False)
    _sampler: Sampler = field(init=False)
    _steps: list[Step] = field(init=False, default_factory=list)
    _evaluations: dict[int, dict[str, float]] = field(init=False, default_factory=dict)
    _loading: tuple[str, ...] = field(init=False, default=())
    _first: int = field(init=False, default=0)
    _saved: int = field(init=False, default=0)
    _told: int = field(init=False, default=0)
    _finite: int | None = field(init=False, default=None)
    _guard: Guard = field(init=False)
    _workers: Workers | None = field(init=False, default=None)
    _extras: Extras | None = field(init=False, default=None)
    _noted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.job.folder is not None:
            self._checkpoints = Checkpoints(self.job.folder, self.job.options.keep)
        self._clock = TrainingClock(self.program.mesh.device)
        self._guard = Guard(self.program, self.job.options.on_nan, self._warn)

    def load(self) -> dict[str, Any] | None:
        """Fill the program from the newest checkpoint, and return the progress in it. Returns None if there is none."""
        going = self.job.options.on_nan == GO
        path = None if self._checkpoints is None else self._checkpoints.latest(finite=not going)
        if self._checkpoints is None or path is None:
            if self.program.mesh.rank == 0:
                logger.warning("%s holds no checkpoint yet: the run begins anew", self.job.folder)
            return None
        progress = self._checkpoints.load(self.program, path)
        self._first = self._saved = self.program.steps
        self._guard.skipped = int(progress.get("skipped_steps", 0))
        last = self._checkpoints.last_finite() if going else path
        self._finite = None if last is None else step_of(last)
        if not progress.get("finite", True):
            self._warn(f"resuming from {path.name}, which is not finite; the last finite one is {last and last.name}")
        return progress

    def offer(self, progress: Progress, batches: int | None) -> None:
        """Offer to go on without a worker that is killed, if this training can; its epochs have `batches` batches."""
        if can_go_on(self.program, batches):
            self.join_point.first_step, self._noted = self.first_step, True
            self.note_join_point(progress)
            regroup.offer()

    def note_join_point(self, progress: Progress) -> None:
        """Note where this worker stands, if it has offered to go on without another one."""
        if self._noted:
            self.join_point.note(self.program, progress, self._guard.skipped)

    def go_on(self) -> None:
        """Go on after a killed worker was started again, from the program's steps. Collective."""
        self._first, self._guard.skipped = self.program.steps, self.join_point.skipped
        path = None if self._checkpoints is None else self._checkpoints.latest(finite=False)
        self._saved = 0 if path is None else step_of(path)

    def _notes(self) -> list[str]:
        """Return what the user should know about the workload, the strategy and the machine, one line each."""
        mesh = self.program.mesh
        crowded = crowding(self.program.strategy.workers) if mesh.device.type == "cpu" else ""
        noted = [*self.program.workload.notes, *self.program.notes, *self._loading, *self.join_point.notes]
        return [*noted, *([crowded] if crowded else [])]

    @contextmanager
    def open(self, total: int | None, notes: Iterable[str] = ()) -> Iterator[None]:
        """Open the log for the training in the block, which ends after step `total` (None: unknown).

        `notes` are shown to the user, one line each, beside those of the program.
        """
        self._loading = tuple(notes)
        self._sampler = Sampler(self.program.mesh.device, sampled_steps(None if total is None else total - self._first))
        with ExitStack() as stack:
            job = self.job
            if self.program.mesh.rank == 0:
                self._note_begin(total)
                self._log = stack.enter_context(self._new_log(total))
            if job.folder is not None:
                self._workers = Workers()
                self._extras = Extras(self.program, job, job.folder, self._workers, self._warn)
                if self.program.mesh.device.type == "cpu":
                    stack.enter_context(waiting.counting())
                stack.callback(self._extras.abandon)
                self._extras.begin(self._first)
            if self._log is not None:
                for note in (str(self.first_step), *self._notes()):
                    self._log.say(note)
            self._resume()
            yield

    def _new_log(self, total: int | None) -> Log:
        job = self.job
        return Log(
            job.folder,
            str(job.strategy),
            self._first,
            total,
            quiet=job.options.quiet,
            trackers=self._trackers(),
            peak_memory=self._sampler.peak_memory,
        )

    def _note_begin(self, total: int | None) -> None:
        """Note in the run's messages that a training begins, which ends after step `total` (None: unknown)."""
        if self.job.folder is None:
            return
        add_message(
            self.job.folder,
            "begin",
            step=self._first,
            total_steps=total,
            workers=self.job.strategy.workers,
            host=socket.gethostname(),
            predicted_seconds=self.job.forecast.seconds,
            predicted_memory_bytes=self.job.forecast.memory_bytes,
        )

    def _trackers(self) -> list[Tracker]:
        """Open the trackers of the run; without a folder there are none."""
        job, workload = self.job, self.program.workload
        if job.folder is None:
            return []
        config = {
            "workload": workload.name,
            "settings": {name: str(value) for name, value in job.source.settings.items()},
            "batch_size": workload.batch_size,
            "seed": workload.seed,
            "strategy": str(job.strategy),
            "workers": job.strategy.workers,
            "steps": job.options.steps,
            "epochs": job.options.epochs,
            "predicted_seconds": job.forecast.seconds,
        }
        return open_trackers(job.options.track, TrackedRun(job.folder, self._first, config, quiet=job.options.quiet))

    @contextmanager
    def step(self, epoch: int, samples: int) -> Iterator[Running]:
        """Time and log the optimizer step in the block, which has `samples` samples over all workers.

        Raises:
            ShardwiseError: the last checkpoint could not be written.
        """
        if self._checkpoints is not None:
            self._checkpoints.poll()
        number = self.program.steps - self._first
        if self.job.slice_steps and number % self.job.slice_steps == 0:
            self._wait_for_turn()
        running, rate = Running(), self._learning_rate()
        with self._sampler.step(number):
            yield running
        profiled = number in self._sampler.steps
        if self._extras is not None:
            last = profiled and number == self._sampler.steps[-1]
            self._extras.step(self.program.steps, self._sampler, profiled=profiled, last_profiled=last)
            if profiled:
                self._extras.times.resume()
        if self._log is None or running.loss is None:
            return
        step = Step(self.program.steps, epoch, 0.0, rate, None, samples, None)
        self._note(
            self._clock.add(step, running.loss, self.program.gradient_norm, self.program.losses, timed=not profiled)
        )
        if profiled:
            self._pause()

    def loss(self) -> float | None:
        """Return the loss of the last step on rank 0. Returns None on other ranks, and if no step was taken."""
        self._pause()
        return self._steps[-1].loss if self._steps else None

    def evaluate(self, epoch: int, numbers: Sequence[int]) -> dict[str, float]:
        """Make the evaluations `numbers` of the workload, log their values and return them."""
        step, values = self.program.steps, self.program.evaluate(numbers)
        self._evaluations.setdefault(step, {}).update(values)
        if self._log is not None:
            self._log.evaluation(step, epoch, values)
            self._tell("on_evaluation", step, dict(values))
        self._resume()
        return values

    def save(self, progress: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint with `progress` (JSON-able), unless this step already has one."""
        if self._checkpoints is None or self.program.steps == self._saved:
            return
        if self._log is not None:
            self._log.sync()
        whole = self.program.is_finite()
        best = progress.get("best", {}).get("step")
        self._checkpoints.protected = {step for step in (best, None if whole else self._finite) if step is not None}
        noted = {"finite": whole, "skipped_steps": self._guard.skipped}
        self._checkpoints.save(self.program, finite({**progress, **noted}))
        self._saved = self.program.steps
        self._finite = self._saved if whole else self._finite
        self._resume()

    def save_finite(self, progress: Mapping[str, Any]) -> None:
        """Write a checkpoint if all weights are finite, and wait until it is on disk."""
        if self._checkpoints is not None:
            if self.program.is_finite():
                self.save(progress)
            self._checkpoints.wait()

    def way_on(self) -> str:
        """Return advice on how to continue after a step that is not finite: the last finite checkpoint, if any."""
        if self._checkpoints is None or self._finite is None:
            return "there is no checkpoint before it: begin anew with a lower learning rate, or with --on-nan skip"
        path = final_path(self._checkpoints.folder, self._finite)
        return f"the last finite checkpoint is {path}: --resume, with a lower learning rate or --on-nan skip"

    def close(self, progress: Progress, stopped: int = 0) -> Trained:
        """Wait until everything is on disk, write the summary, and return the result. Collective.

        Args:
            progress: progress at the end.
            stopped: number of the signal that ended the run early; 0: none did.
        """
        regroup.before_meeting()
        if self._checkpoints is not None:
            self._checkpoints.wait()
        if self._extras is not None:
            self._extras.end(self._sampler.peak_memory())
        workers = self._workers or Workers()
        measured = [json.loads(text) for text in workers.exchange(json.dumps(measure(self._sampler)))]
        summary = self._summary(progress, summarize(measured)) | {"stopped": stopped or None}
        if summary["stopped_early"]:
            self._warn(self._why_early(progress))
        if self._log is not None and self.job.folder is not None:
            write_summary(self.job.folder, summary)
        with self.program.averaged():
            full = self.program.full_state_dict() if self.job.options.weights else None
        return Trained(summary, tuple(self._steps), self._evaluations, full, stopped)

    def _why_early(self, progress: Progress) -> str:
        stop = self.program.workload.stop
        assert stop is not None
        best = progress.stopping.get("value")
        return (
            f"stopped early after step {self.program.steps}: {stop.metric} has not improved on "
            f"{'any number' if best is None else f'{best:.6g}'} for {progress.stopping['waited']} evaluations in a row"
        )

    def _summary(self, progress: Progress, measured: dict[str, Any]) -> dict[str, Any]:
        loss, best = progress.loss, progress.best
        seconds, rate = typical(self._steps, self.program.strategy.local)
        strategy, folder = self.job.strategy, self.job.folder
        forecast = self.job.forecast
        reasons = {"predicted_seconds": forecast.reason} if forecast.seconds is None else {}
        if loss is None:
            reasons["loss"] = "no step was taken"
        elif not isfinite(loss):
            reasons["loss"] = f"the last step's is {loss}, the first that was not finite is step {self._guard.first}"
        if seconds is None:
            reasons["step_seconds"] = reasons["samples_per_second"] = "no step was timed"
        if measured["alpha"] is None:
            reasons["alpha"] = "measured in runs of three steps or more"
        summary: dict[str, Any] = finite(
            {
                "workload": self.program.workload.name,
                "strategy": str(strategy),
                "microbatches": self.program.strategy.microbatches,
                "workers": strategy.workers,
                "transport": used(),
                "steps": self.program.steps,
                "loss": loss,
                "skipped_steps": self._guard.skipped,
                "first_not_finite_step": self._guard.first,
                "metrics": progress.metrics,
                "best_step": best.get("step"),
                "best_metrics": best.get("metrics"),
                "stopped_early": progress.stopped(self.program.workload),
                "samples_per_second": rate,
                "step_seconds": seconds,
                "predicted_seconds": forecast.seconds,
                "error": relative_error(forecast.seconds, seconds),
                **measured,
                "predicted_memory_bytes": forecast.memory_bytes,
                "memory_error": relative_error(forecast.memory_bytes, measured["memory_bytes"]),
                "first_step": asdict(self.first_step),
                "run": None if folder is None else str(folder),
                "notes": self._notes(),
                "slow_workers": watch.slow_workers(),
                "restarted_workers": self.join_point.restarted,
                "reasons": reasons,
            }
        )
        return summary

    def _warn(self, line: str) -> None:
        """Print a line on rank 0, even if there is no progress bar."""
        if self._log is not None:
            self._log.say(line, always=True)
        elif self.program.mesh.rank == 0:
            sys.stderr.write(f"{line}\n")

    def _pause(self) -> None:
        """Complete and log the steps so far, and restart the clock, so that this time belongs to no step."""
        if self._log is not None:
            self._note(self._clock.drain())
        self._resume()

    def _wait_for_turn(self) -> None:
        """Tell the parent of the steps since the last gate, and wait until it is this training's turn."""
        self._pause()
        steps = [asdict(step) for step in self._steps[self._told :]]
        self._told = len(self._steps)
        proof = str(self.first_step)
        gate.pass_gate({"steps": steps, "peak_bytes": self._sampler.peak_memory(), "notes": [proof, *self._notes()]})
        self._resume()

    def _resume(self) -> None:
        """Start the time of the next step now."""
        self._clock.resume()
        if self._extras is not None:
            self._extras.times.resume()

    def _note(self, steps: list[Step]) -> None:
        self._steps.extend(steps)
        for step in steps:
            if self._log is not None:
                self._log.step(step)
                self._tell("on_step", step)

    def _tell(self, method: str, *values: Any) -> None:
        """Call a method of the workload's callbacks that have it; on rank 0.

        Raises:
            WorkloadError: a callback fails.
        """
        for callback in self.program.workload.callbacks:
            function = getattr(callback, method, None)
            if function is None:
                continue
            said = (
                f"callback {type(callback).__name__} of workload {self.program.workload.name!r} fails in {method} "
                f"after step {self.program.steps}"
            )
            with blamed(said, passing=()):
                function(*values)

    def _learning_rate(self) -> float | None:
        optimizer = self.program.optimizer
        return None if optimizer is None else float(optimizer.param_groups[0]["lr"])
