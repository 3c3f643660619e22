"""Policy of a training for steps whose loss or gradient is not finite: stop, skip the update, or go on.

A skipped step counts as a step: its batch is used up, and the step number advances. Its update is not applied, the
learning-rate schedule does not move, and buffers are restored. All workers do so, as one process would.
`torch.amp.GradScaler` and DeepSpeed treat overflows in this way too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from shardwise.errors import NotFinite
from shardwise.parallel.faults import Fault
from shardwise.parallel.program import Program
from shardwise.run.training.job import GO, SKIP, STOP

MOST_SKIPPED = 20
"""Number of skipped steps in a row at which the training stops: a single bad batch cannot be the cause."""


class Guard:
    """Judge of the steps of a program, see `Program.ask_before_update`.

    Args:
        program: program whose steps to judge.
        policy: one of `job.POLICIES`.
        say: function that shows one line to the user; called once.
        skipped: number of steps that were skipped before a resume.

    Attributes:
        skipped: number of steps whose update was not applied; of turns, if steps have them.
        first: number of the first step that was not finite, from 1; None if all were finite.
    """

    def __init__(self, program: Program, policy: str, say: Callable[[str], None], skipped: int = 0) -> None:
        self.skipped = skipped
        self.first: int | None = None
        self._program, self._policy, self._say = program, policy, say
        self._in_a_row: Counter[int] = Counter()
        program.ask_before_update(self._judge)

    def _judge(self, loss: float, square: float, search: Callable[[], Fault | None]) -> bool:
        """Return whether to apply a step's update; all workers return the same value.

        Args:
            loss: loss of the step.
            square: squared norm of the gradient.
            search: function that finds the first module or parameter that is not finite. Collective.

        Raises:
            NotFinite: the policy is to stop, or too many steps in a row were skipped.
        """
        turn = self._program.engine.position.turn
        if math.isfinite(loss) and math.isfinite(square):
            self._in_a_row[turn] = 0
            return True
        step = self._program.judged
        told, self.first = self.first is not None, self.first or step
        self._in_a_row[turn] += 1
        if self._policy == STOP:
            kept = "the turns before this one were" if self._program.midway else "nothing of this step was"
            raise NotFinite(f"step {step}: {_said(loss, search())}; {kept} applied")
        if self._policy == SKIP and self._in_a_row[turn] == MOST_SKIPPED:
            raise NotFinite(f"step {step}: {_said(loss, search())}; skipped {MOST_SKIPPED} such steps in a row")
        if not told:
            done = "its update is skipped" if self._policy == SKIP else "the training goes on (--on-nan go)"
            self._say(f"step {step}: {_said(loss, search())}; {done}, further ones are not told")
        if self._policy == GO:
            self._program.ask_before_update(None)
            return True
        self.skipped += 1
        return False


def _said(loss: float, fault: Fault | None) -> str:
    """Describe what is not finite, and the module or parameter where it begins."""
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is not finite (the loss is {loss:.4g})"
    if fault is not None:
        return f"{what}; the first that is not finite is {fault}"
    if math.isfinite(loss):
        return f"{what}; no single gradient is inf or nan, their squared norm overflows"
    return f"{what}; which module comes first cannot be told: the same passes gave finite numbers when run again"
