"""Order in which a pipeline worker computes: pure tables, which the runner executes and a simulator can replay.

Stage s is on worker s % P of P workers. For P = 3 workers and 4 microbatches, F forward, B backward:

    gpipe (Huang et al. 2019)              1f1b (Narayanan et al. 2019)
    0  F0 F1 F2 F3 B0 B1 B2 B3             0  F0 F1 F2 B0 F3 B1 B2 B3
    1  F0 F1 F2 F3 B0 B1 B2 B3             1  F0 F1 B0 F2 B1 F3 B2 B3
    2  F0 F1 F2 F3 B0 B1 B2 B3             2  F0 B0 F1 B1 F2 B2 F3 B3

    interleaved (Narayanan et al. 2021)    several stages per worker: smaller bubbles, more messages
    zero-bubble (ZB-H1; Qi et al. 2023)    the backward pass in two: I for the inputs, which others need, and W for
                                           the weights, which fills the bubbles
    pipedream (Narayanan et al. 2021)      1f1b without an end: the backward passes that a step leaves (b) run between
                                           the forward passes of the next one, see `streamed`

    0  F0 F1 F2 B0 F3 B1 | F0 b2 F1 b3 F2 B0 F3 B1 | ...
    1  F0 F1 B0 F2 B1 F3 B2 | F0 b3 F1 B0 F2 B1 F3 B2 | ...
    2  F0 B0 F1 B1 F2 B2 F3 B3 | F0 B0 F1 B1 F2 B2 F3 B3 | ...
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = "F"
BACKWARD = "B"
INPUT = "I"
WEIGHT = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a schedule: `kind` F, B, I or W of a microbatch on a stage."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def order(
    schedule: str, worker: int, workers: int, stages_per_worker: int, microbatches: int, *, last_whole: bool = False
) -> list[Action]:
    """Return the actions of one pipeline worker in one step, in its order.

    Args:
        schedule: gpipe, 1f1b, interleaved or zero-bubble; a step of pipedream alone is one of 1f1b.
        worker: its index in the pipeline.
        workers: number of workers in the pipeline.
        stages_per_worker: 1, or more for interleaved.
        microbatches: number of microbatches. Interleaved needs a multiple of `workers`; with other numbers (the tail of
            an epoch) it falls back to gpipe.
        last_whole: do not split the last backward of a stage, and complete all others before it. Gradients that are
            reduced as they become ready need that.
    """
    if workers == 1:
        return [action for m in range(microbatches) for action in _alone(stages_per_worker, m)]
    if schedule == "gpipe" or (schedule == "interleaved" and microbatches % workers):
        return gpipe(worker, workers, stages_per_worker, microbatches)
    if schedule == "interleaved":
        return interleaved(worker, workers, stages_per_worker, microbatches)
    if schedule == "zero-bubble":
        return zero_bubble(worker, workers, microbatches, last_whole=last_whole)
    return one_forward_one_backward(worker, workers, microbatches)


def _alone(stages: int, microbatch: int) -> list[Action]:
    forward = [Action(FORWARD, s, microbatch) for s in range(stages)]
    return forward + [Action(BACKWARD, s, microbatch) for s in reversed(range(stages))]


def gpipe(worker: int, workers: int, stages_per_worker: int, microbatches: int) -> list[Action]:
    """List all forwards, then all backwards."""
    stages = [worker + chunk * workers for chunk in range(stages_per_worker)]
    forward = [Action(FORWARD, s, m) for s in stages for m in range(microbatches)]
    return forward + [Action(BACKWARD, s, m) for s in reversed(stages) for m in range(microbatches)]


def one_forward_one_backward(worker: int, workers: int, microbatches: int) -> list[Action]:
    """List forwards to fill the pipeline, then alternate: at most `workers` microbatches are in flight."""
    ahead = min(workers - worker - 1, microbatches)
    forward = [Action(FORWARD, worker, m) for m in range(microbatches)]
    backward = [Action(BACKWARD, worker, m) for m in range(microbatches)]
    return _alternate(forward, backward, ahead)


def interleaved(worker: int, workers: int, stages_per_worker: int, microbatches: int) -> list[Action]:
    """Schedule several stages per worker, in rounds of `workers` microbatches."""
    total = microbatches * stages_per_worker

    def action(kind: str, k: int) -> Action:
        chunk = k // workers % stages_per_worker
        if kind == BACKWARD:
            chunk = stages_per_worker - 1 - chunk
        microbatch = k // (workers * stages_per_worker) * workers + k % workers
        return Action(kind, chunk * workers + worker, microbatch)

    ahead = min(total, 2 * (workers - worker - 1) + (stages_per_worker - 1) * workers)
    forward = [action(FORWARD, k) for k in range(total)]
    backward = [action(BACKWARD, k) for k in range(total)]
    return _alternate(forward, backward, ahead)


def left_after(worker: int, workers: int) -> int:
    """Return the number of backward passes that a step of `pipedream` leaves to the next one on a worker."""
    return workers - worker - 1


def streamed(
    worker: int, workers: int, microbatches: int, half: int = 0, *, left: bool = True, goes_on: bool = True
) -> list[Action]:
    """Return the actions of one step of `pipedream`, in which the next step begins before this one has ended.

    Microbatches have numbers in a window of two steps: 0 to m - 1 in one half of it, m to 2 m - 1 in the other.

    Args:
        worker: index in the pipeline.
        workers: number of workers in the pipeline.
        microbatches: number of microbatches m of the step; where it goes on, at least workers - 1.
        half: half of the window, 0 or 1, that the step has; the step before has the other.
        left: whether the step before has left backward passes to this one.
        goes_on: whether this step leaves backward passes to the next one; else it ends with all of them.
    """
    ahead = min(left_after(worker, workers), microbatches)
    before = ahead if left else 0
    forward = [Action(FORWARD, worker, half * microbatches + m) for m in range(microbatches)]
    backward = remaining(worker, workers, microbatches, 1 - half) if left else []
    backward += [Action(BACKWARD, worker, each.microbatch) for each in forward]
    first = ahead - before
    return _alternate(forward, backward[: microbatches - first] if goes_on else backward, first)


def remaining(worker: int, workers: int, microbatches: int, half: int) -> list[Action]:
    """Return the backward passes that a step of `pipedream` in this half of its window leaves to the next one."""
    count = left_after(worker, workers)
    end = (half + 1) * microbatches
    return [Action(BACKWARD, worker, m) for m in range(end - count, end)]


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> list[Action]:
    """List `ahead` forwards, then pairs of a forward and a backward, then the remaining backwards."""
    actions = forward[:ahead]
    for f, b in zip(forward[ahead:], backward, strict=False):
        actions += [f, b]
    return actions + backward[len(forward) - ahead :]


def zero_bubble(worker: int, workers: int, microbatches: int, *, last_whole: bool = False) -> list[Action]:
    """Schedule 1f1b with split backwards. Weight gradients follow `worker` microbatches later and fill the bubbles."""
    actions: list[Action] = []
    pending: list[int] = []
    last = microbatches - 1
    for action in one_forward_one_backward(worker, workers, microbatches):
        if action.kind == FORWARD:
            actions.append(action)
            continue
        if last_whole and action.microbatch == last:
            actions += [Action(WEIGHT, worker, m) for m in pending]
            return [*actions, Action(BACKWARD, worker, last)]
        actions.append(Action(INPUT, worker, action.microbatch))
        pending.append(action.microbatch)
        if len(pending) > worker:
            actions.append(Action(WEIGHT, worker, pending.pop(0)))
    return actions + [Action(WEIGHT, worker, m) for m in pending]
