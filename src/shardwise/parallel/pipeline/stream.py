"""Run the steps of a pipeline one after the other without waiting for the end of each (`schedule=pipedream`).

In step t a worker runs the forward passes of the step and, between them, the backward passes that step t - 1 has left
(`splitting.schedule.streamed`). The gradient of step t - 1 is complete within step t, at the weights of its own forward
passes, and updates the weights that step t + 1 begins with: W(t + 1) = W(t) - step of the optimizer with the gradient
of step t - 1 at W(t - 1) (Narayanan et al. 2021, PipeDream-2BW, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from shardwise.parallel.pipeline.executor import PipelineExecutor, PipelinePass
from shardwise.parallel.pipeline.stage import StepWork
from shardwise.parallel.pipeline.weight_versions import WeightVersions
from shardwise.splitting.schedule import Action, left_after, remaining, streamed
from shardwise.strategy import PIPEDREAM


def tied_stages(name: str) -> str:
    """Return the message that several stages use a parameter, which `schedule=pipedream` cannot train."""
    return (
        f"schedule={PIPEDREAM}: {name} is used in several stages, which would wait for each other's gradients of it in "
        "every step: use schedule=1f1b"
    )


@dataclass(frozen=True, slots=True)
class StreamedMicrobatch:
    """A microbatch of a step, as `PipelinePass` has it.

    Attributes:
        work: work of the stages for its shapes.
        given: the batch and constants by placeholder.
        scale: factor of its loss, 0-d.
        enter: called before its forward pass.
    """

    work: StepWork
    given: Mapping[str, Any]
    scale: Tensor
    enter: Callable[[], None]


class PipelineStream:
    """Steps of a pipeline, of which each begins before the one before it has ended. Every method is collective.

    Args:
        executor: this worker's stages and messages.
        versions: their weights.
        microbatches: microbatches of a usual step; another number ends the step before first, and itself.
        before_backward: called with (stage, whether it is the stage's last backward of this pass).
    """

    def __init__(
        self,
        executor: PipelineExecutor,
        versions: WeightVersions,
        microbatches: int,
        before_backward: Callable[[int, bool], None],
    ) -> None:
        self._executor, self.versions, self._before = executor, versions, before_backward
        self._microbatches, self._half, self._left = microbatches, 0, False
        self._window: dict[int, tuple[StreamedMicrobatch, int]] = {}

    def advance(self, microbatches: Sequence[StreamedMicrobatch], complete: Callable[[], None]) -> Tensor:
        """Run a step up to the backward passes that it leaves, with the newest weights.

        Args:
            microbatches: those of the step.
            complete: called once, when the gradient of the step before is complete and passes use the parameters
                themselves; until then other workers may wait for messages.

        Returns the sum of scale times loss over this worker's microbatches.
        """
        count, workers = len(microbatches), self._executor.workers
        goes_on = count == self._microbatches
        if not goes_on:
            self.drain()
        self._half = 1 - self._half if self._left else 0
        own = ((each, self.versions.newest) for each in microbatches)
        self._window.update(enumerate(own, self._half * count))
        tables = partial(
            streamed, workers=workers, microbatches=count, half=self._half, left=self._left, goes_on=goes_on
        )
        waiting = left_after(self._executor.worker, workers) if self._left else 0
        loss = self._run(tables, goes_on=goes_on, waiting=waiting, complete=complete)
        self._left = goes_on
        return loss

    def drain(self) -> None:
        """Run the backward passes that the last step has left."""
        if not self._left:
            return
        workers, count = self._executor.workers, self._microbatches
        self._left = False
        self._run(partial(remaining, workers=workers, microbatches=count, half=self._half), goes_on=False)
        self._window.clear()

    def _run(
        self,
        tables: Callable[[int], Sequence[Action]],
        *,
        goes_on: bool,
        waiting: int = -1,
        complete: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Run this worker's table; `complete` is called before the first action after `waiting` backward passes."""

        def completed() -> None:
            nonlocal waiting
            if waiting == 0:
                self.versions.use(None)
                complete()
                waiting = -1

        def enter(number: int) -> None:
            completed()
            each, version = self._window[number]
            self.versions.use(version)
            each.enter()

        def before_backward(action: Action, final: bool) -> None:
            nonlocal waiting
            completed()
            self.versions.use(self._window[action.microbatch][1])
            self._before(action.stage, final)
            waiting -= waiting > 0

        known = {worker: tables(worker) for worker in range(self._executor.workers)}
        try:
            return self._executor.run(
                PipelinePass(
                    {number: each.work for number, (each, _) in self._window.items()},
                    known[self._executor.worker],
                    known.__getitem__,
                    {number: each.given for number, (each, _) in self._window.items()},
                    {number: each.scale for number, (each, _) in self._window.items()},
                    enter,
                    before_backward,
                    goes_on,
                )
            )
        finally:
            self.versions.use(None)
