"""How long a pipeline takes, in closed form, from the passes of its stages.

With p workers, m microbatches, f, b, w seconds of a stage's forward, backward (of the inputs) and weights' pass, and
l of a message, L = sum of all f and b + 2 sum of l is what one microbatch takes alone:

    gpipe         L + (m - 1) (max f + max b)                                    (Huang et al. 2019)
    1f1b          L + (m - 1) max (f + b), or where messages take long: a worker s has p - s microbatches under way,
                  so that every (p - s)-th waits for a whole round trip          (Narayanan et al. 2019)
    interleaved   the same with v passes of stages of 1/v                        (Narayanan et al. 2021, section 2.2)
    zero-bubble   the first p - 1 intervals without the weights' pass            (Qi et al. 2023, section 2, ZB-H1)

For equal stages and l = 0 these give bubbles of (p - 1) (f + b), (p - 1) (f + b) / v and (p - 1) (f + b - w).
`predict.timeline` plays the tables of actions themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage: passes of one microbatch, and the messages that it waits for.

    Attributes:
        forward, backward, weights: of one microbatch.
        arrives: until what the stage before sent has arrived, after it was sent.
        returns: until the gradient that the stage behind sent has arrived.
    """

    forward: float
    backward: float
    weights: float = 0.0
    arrives: float = 0.0
    returns: float = 0.0


def pipeline_seconds(schedule: str, stages: Sequence[StageTime], workers: int, microbatches: int) -> float:
    """Until the first stage has done its last backward pass.

    Args:
        schedule: as in `strategy.Strategy`.
        stages: all of them in order; stage s lies on worker s % workers.
        workers: of the pipeline.
        microbatches: of a step.
    """
    if schedule == "interleaved" and microbatches % workers == 0:
        return _interleaved(stages, workers, microbatches)
    if schedule in ("gpipe", "interleaved"):
        return _gpipe(stages, workers, microbatches)
    if schedule == "zero-bubble":
        return _zero_bubble(stages, microbatches)
    return _alternating(stages, microbatches)


def alone(stages: Sequence[StageTime]) -> float:
    """What one microbatch takes alone, without weights that are put off."""
    return sum(stage.forward + stage.backward + stage.arrives + stage.returns for stage in stages)


def _gpipe(stages: Sequence[StageTime], workers: int, microbatches: int) -> float:
    rest = microbatches - 1
    forward = max(sum(s.forward for s in stages[w::workers]) for w in range(workers))
    backward = max(sum(s.backward for s in stages[w::workers]) for w in range(workers))
    return alone(stages) + rest * (forward + backward)


def _alternating(stages: Sequence[StageTime], microbatches: int) -> float:
    one = alone(stages)
    rest = microbatches - 1
    best = one + rest * max(stage.forward + stage.backward for stage in stages)
    behind = 0.0
    for place in reversed(range(len(stages))):
        stage = stages[place]
        trip = stage.forward + behind + stage.backward
        trips, left = divmod(rest, len(stages) - place)
        best = max(best, one + trips * trip + left * (stage.forward + stage.backward))
        behind += stage.forward + stage.backward + stage.arrives + stage.returns
    return best


def _zero_bubble(stages: Sequence[StageTime], microbatches: int) -> float:
    one, count = alone(stages), len(stages)
    short = max(stage.forward + stage.backward for stage in stages)
    long = max(stage.forward + stage.backward + stage.weights for stage in stages)
    filling = min(microbatches, count) - 1
    best = one + filling * short + max(microbatches - count, 0) * long + stages[0].weights
    entered = 0.0
    for stage in stages:
        entered += stage.arrives
        best = max(best, entered + microbatches * (stage.forward + stage.backward + stage.weights))
        entered += stage.forward
    return best


def _interleaved(stages: Sequence[StageTime], workers: int, microbatches: int) -> float:
    """All stages of a worker for each microbatch, and once the others' first and last stages to fill and to drain."""
    busy = [sum(s.forward + s.backward for s in stages[w::workers]) for w in range(workers)]
    most = max(range(workers), key=lambda w: busy[w])
    first, last = stages[:workers], stages[-workers:]
    fill = sum(s.forward + s.arrives for s in first) - first[most].forward
    drain = sum(s.backward + s.returns for s in first) - first[most].backward
    del last
    return fill + microbatches * busy[most] + drain
