"""Several trainings of one machine, measured in turns: A B C A B C, each a slice of its steps.

What else the machine does, its temperature and its clock change over minutes: trainings one after the other would each
be measured under other conditions. Here the workers of all live at the same time. They wait at their gates
(`launch.gate`), where the parent stops them (SIGSTOP); it lets those of one training go on at a time. Trainings that
the memory does not hold at once form several groups, one after the other; on GPUs each is a group of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from shardwise.errors import ShardwiseError
from shardwise.launch import watch
from shardwise.launch.local import LOOK_SECONDS, LocalRun
from shardwise.launch.signals import Signals, Terminated
from shardwise.run.training.execute import PATIENCE_SECONDS, work
from shardwise.run.training.job import Job
from shardwise.run.training.lock import released
from shardwise.run.training.messages import note_end
from shardwise.run.training.result import Step, Trained
from shardwise.run.training.run_folder import discard_unused

ROUNDS, LEAST_STEPS, MOST_STEPS = 12, 3, 50
"""Slices that a training is cut into, and bounds of their steps: the first step of a slice warms up."""

MEMORY_SHARE = 0.9
"""Share of the free memory that trainings may need together to take turns."""

UNPREDICTED_TIMES = 2.0
"""Memory that a training is assumed to need if none was predicted, over what the largest took before its first step."""


@dataclass(slots=True, eq=False)
class Turns:
    """A training that takes turns with others.

    Attributes:
        job: its job.
        name: its name for people.
        work: function that trains, in each worker.
        steps: steps so far.
        memory_bytes: largest peak memory of a worker so far.
        trained: its result once it is over.
        failed: why it failed; empty if it did not.
        error: error by which it failed.
    """

    job: Job
    name: str
    work: Callable[[Job], Trained] = work
    steps: list[Step] = field(default_factory=list)
    memory_bytes: int | None = None
    trained: Trained | None = None
    failed: str = ""
    error: ShardwiseError | None = None
    running: LocalRun | None = None

    @property
    def over(self) -> bool:
        """Return whether it has ended or failed."""
        return self.trained is not None or self.error is not None


def slice_steps(total: int | None) -> int:
    """Return the number of steps of a slice in a training of `total` steps; None: unknown."""
    return MOST_STEPS if total is None else max(LEAST_STEPS, min(MOST_STEPS, -(-total // ROUNDS)))


class TrainingInTurns:
    """All trainings of a comparison.

    Attributes:
        trainings: the trainings, whose fields say how far each came, also after an interruption.
        groups: names of the trainings that took turns with each other.

    Args:
        trainings: the trainings.
        steps: steps of each; None: unknown.
        threads: intra-op threads of each worker; None: an even share of the cores for each training.
        gpus: whether workers may use GPUs.
        quiet: show no progress bar.
    """

    def __init__(
        self, trainings: Sequence[Turns], *, steps: int | None, threads: int | None, gpus: bool, quiet: bool
    ) -> None:
        self.trainings, self._steps = list(trainings), steps
        self.groups: list[list[str]] = []
        self._threads, self._gpus, self._quiet = threads, gpus, quiet
        self._signals = Signals()

    def run(self) -> None:
        """Train all of them. A training that fails ends, and the others go on.

        Raises:
            KeyboardInterrupt: Ctrl-C; all workers have been ended.
            Terminated: this process was told to end; all workers have been ended.
        """
        left = list(self.trainings)
        with ExitStack() as stack, self._signals:
            for each in left:
                stack.enter_context(released(each.job.folder))
            bar = stack.enter_context(self._bar())
            try:
                while left:
                    group = self._start(left, bar)
                    self.groups.append([each.name for each in group])
                    left = [each for each in left if each not in group]
                    while any(not each.over for each in group):
                        for each in group:
                            self._take_turn(each, bar)
            finally:
                self._signals.mute()  # a further signal cannot end it sooner
                for each in self.trainings:
                    _end(each)

    def _bar(self) -> tqdm:
        """Return the progress bar of all trainings together."""
        return tqdm(
            desc="compare",
            unit="step",
            disable=self._quiet,
            total=None if self._steps is None else self._steps * len(self.trainings),
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )

    def _start(self, left: Sequence[Turns], bar: tqdm) -> list[Turns]:
        """Start as many trainings as fit into memory together, one after the other, up to their first gates."""
        import torch

        from shardwise.run.training.process_memory import free_memory

        budget = MEMORY_SHARE * free_memory(torch.device("cpu"))
        group: list[Turns] = []
        for each in left:
            if group and (self._gpus or sum(self._need(one, group) for one in (*group, each) if not one.over) > budget):
                break
            group.append(each)
            job = each.job
            limits = watch.limits(job.options.hang_timeout, job.forecast.seconds)
            each.running = LocalRun(
                each.work,
                (job,),
                workers=job.strategy.workers,
                threads=self._threads,
                gpus=self._gpus,
                patience=limits.idle + PATIENCE_SECONDS,
            )
            self._wait(each, bar)
        return group

    @staticmethod
    def _need(each: Turns, group: Sequence[Turns]) -> float:
        """Return the bytes that a training will need: predicted, else told by what those of the group took so far."""
        workers = each.job.strategy.workers
        if each.job.forecast.memory_bytes is not None:
            return workers * each.job.forecast.memory_bytes
        taken = each.memory_bytes or max((other.memory_bytes or 0 for other in group), default=0)
        return UNPREDICTED_TIMES * workers * taken

    def _take_turn(self, each: Turns, bar: tqdm) -> None:
        """Let a training take the steps of one slice."""
        if each.over or each.running is None:
            return
        each.running.open_gates()
        self._wait(each, bar)

    def _wait(self, each: Turns, bar: tqdm) -> None:
        """Wait until a training comes to its next gate, ends or fails."""
        running = each.running
        assert running is not None
        bar.set_postfix_str(each.name, refresh=False)
        try:
            while True:
                if self._signals.stop:
                    raise Terminated(128 + self._signals.stop)
                values = running.at_gate
                if values is not None:
                    running.stop()
                    _note(each, values, bar)
                    return
                if running.finished:
                    each.trained = running.returned()
                    bar.update(max(0, len(each.trained.steps) - len(each.steps)))
                    each.steps = list(each.trained.steps)
                    _end(each)
                    return
                running.check()
                time.sleep(LOOK_SECONDS)
        except ShardwiseError as error:
            each.error, each.failed = error, str(error)
            tqdm.write(f"shardwise: {each.name}: {error}; the others go on", file=sys.stderr)
            _end(each)


def _note(each: Turns, values: Sequence[dict[str, Any]], bar: tqdm) -> None:
    """Note what the workers of a training told at their gates."""
    first = not each.steps and each.memory_bytes is None
    steps = [Step(**step) for step in values[0]["steps"]]
    each.steps += steps
    bar.update(len(steps))
    each.memory_bytes = max(value["peak_bytes"] for value in values)
    if first and not bar.disable:
        for note in values[0]["notes"]:
            tqdm.write(f"{each.name}: {note}", file=sys.stderr)


def _end(each: Turns) -> None:
    """End the workers of a training, if any still run."""
    running, each.running = each.running, None
    if running is not None:
        running.end()
        note_end(each.job.folder, None if each.trained else each.error or KeyboardInterrupt())
    if each.trained is None and each.job.folder is not None and each.job.folder.exists():
        discard_unused(each.job.folder)
