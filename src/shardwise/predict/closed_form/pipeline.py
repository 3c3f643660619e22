"""Step time of a pipeline from the passes of its stages, in closed form.

Let there be p workers and m microbatches. A stage needs f, b and w seconds for its forward pass, its backward pass (for
inputs, where it is split) and its pass for weight gradients, and a message takes l seconds. One microbatch alone then
takes L = sum of all f and b + 2 sum of l:

    gpipe         L + (m - 1) (max f + max b)                                    (Huang et al. 2019)
    1f1b          L + (m - 1) max (f + b), or more where messages are slow: worker s has p - s microbatches in flight,
                  so that every (p - s)-th waits for a whole round trip          (Narayanan et al. 2019)
    interleaved   like 1f1b, with v passes of stages of 1/v                      (Narayanan et al. 2021, section 2.2)
    zero-bubble   like 1f1b, but w is not part of the first p - 1 intervals      (Qi et al. 2023, section 2, ZB-H1)

For equal stages and l = 0 these give bubbles of (p - 1) (f + b), (p - 1) (f + b) / v and (p - 1) (f + b - w).
Short tables are simulated instead, pass by pass: each starts as soon as its worker and its inputs are ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwise.splitting.schedule import BACKWARD, INPUT, Action


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage: its passes for one microbatch, and the messages that it waits for.

    Attributes:
        forward, backward, weights: seconds of each pass; `backward` is for inputs only where `weights` is above 0.
        arrives: seconds of the messages with activations, from previous stages.
        returns: seconds of the messages with gradients, from later stages.
    """

    forward: float
    backward: float
    weights: float = 0.0
    arrives: float = 0.0
    returns: float = 0.0


@dataclass(frozen=True, slots=True)
class TimedPass:
    """One pass of a worker's table, with its seconds.

    Attributes:
        action: kind of pass, stage and microbatch.
        seconds: seconds of the device.
        launching: seconds of the host to launch its kernels; the host runs ahead of the device.
        alone: seconds from the start of launching to the last kernel's end, if only its host delays the device.
        after: least seconds from the end of the pass until its gradient buckets are reduced. The worker continues with
            other passes meanwhile.
        sending: seconds of the all-reduces of its buckets, queued behind those of the worker's earlier passes.
    """

    action: Action
    seconds: float
    launching: float = 0.0
    alone: float = 0.0
    after: float = 0.0
    sending: float = 0.0

    @property
    def hosted(self) -> float:
        """Return the least seconds from the start of its launch to its end."""
        return max(self.alone, self.launching) if self.launching else 0.0


Messages = Mapping[tuple[str, int], Sequence[tuple[int, float]]]
"""(F or B, stage that receives) -> (stage on another worker that sends, seconds of the message) of each message."""


def played(tables: Sequence[Sequence[TimedPass]], messages: Messages) -> list[float]:
    """Simulate a pipeline and return the time at which each worker is done with its table.

    Messages from one worker to another are sent one after the other.

    Args:
        tables: the table of each worker, by pipeline rank; stage s lies on worker s % len(tables).
        messages: messages between stages on different workers.
    """
    game = _Game(tables, messages)
    while any(index < len(table) for index, table in zip(game.positions, tables, strict=True)):
        for worker in range(len(tables)):
            game.play(worker)
    return game.ends


class _Game:
    def __init__(self, tables: Sequence[Sequence[TimedPass]], messages: Messages) -> None:
        self.tables, self.messages = tables, messages
        self.positions, self.ends = [0] * len(tables), [0.0] * len(tables)
        self._clocks, self._hosts = [0.0] * len(tables), [0.0] * len(tables)
        self._arrived: dict[tuple[str, int, int, int], float] = {}
        self._channels: dict[tuple[int, int], float] = {}
        self._sent = [0.0] * len(tables)
        self._targets: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for (kind, target), sources in messages.items():
            for source, seconds in sources:
                self._targets.setdefault((kind, source), []).append((target, seconds))

    def play(self, worker: int) -> None:
        """Run passes of a worker until it has to wait for another worker, or is done with its table."""
        table = self.tables[worker]
        while self.positions[worker] < len(table):
            turn = table[self.positions[worker]]
            arrived = self._when(turn.action)
            if arrived is None:
                return
            self.positions[worker] += 1
            self._pass(worker, turn, max(self._clocks[worker], arrived))

    def _when(self, action: Action) -> float | None:
        """Return the time at which all inputs of an action have arrived; None if one of them has not been sent yet."""
        latest = 0.0
        kind = BACKWARD if action.kind == INPUT else action.kind
        for source, _ in self.messages.get((kind, action.stage), ()):
            arrival = self._arrived.get((kind, source, action.stage, action.microbatch))
            if arrival is None:
                return None
            latest = max(latest, arrival)
        return latest

    def _pass(self, worker: int, turn: TimedPass, start: float) -> None:
        action = turn.action
        kind = BACKWARD if action.kind == INPUT else action.kind
        end = max(start + turn.seconds, self._hosts[worker] + turn.hosted)
        self._hosts[worker] += turn.launching
        self._clocks[worker] = end
        if turn.sending or turn.after:
            self._sent[worker] = max(self._sent[worker] + turn.sending, end + turn.after)
        self.ends[worker] = max(end, self._sent[worker])
        for target, seconds in self._targets.get((kind, action.stage), ()):
            channel = worker, target % len(self.tables)
            sent = max(end, self._channels.get(channel, 0.0)) + seconds
            self._channels[channel] = self._arrived[kind, action.stage, target, action.microbatch] = sent


def pipeline_seconds(schedule: str, stages: Sequence[StageTime], workers: int, microbatches: int) -> float:
    """Return the seconds from the start of a step until the first stage is done with its last backward pass.

    Args:
        schedule: name of the schedule, as in `strategy.Strategy`.
        stages: times of all stages, in order; stage s lies on worker s % workers.
        workers: number of pipeline workers.
        microbatches: microbatches per step.
    """
    if schedule == "interleaved" and microbatches % workers == 0:
        found = _interleaved(stages, workers, microbatches)
    elif schedule in ("gpipe", "interleaved"):
        found = _gpipe(stages, workers, microbatches)
    elif schedule == "zero-bubble":
        found = _zero_bubble(stages, microbatches)
    else:
        found = _alternating(stages, microbatches)
    between = max(sum(max(s.arrives, s.returns) for s in stages[w::workers]) for w in range(workers))
    return max(found, alone(stages) + (microbatches - 1) * between)  # messages are sent one after the other, too


def alone(stages: Sequence[StageTime]) -> float:
    """Return the seconds of one microbatch alone, without its delayed passes for weight gradients."""
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
    for index in reversed(range(len(stages))):
        stage = stages[index]
        trip = stage.forward + behind + stage.backward
        trips, left = divmod(rest, len(stages) - index)
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
    """Return the seconds of an interleaved schedule.

    They are all microbatches on the busiest worker, plus one pass through the first stage of each other worker to fill
    the pipeline and one to drain it.
    """
    busy = [sum(s.forward + s.backward for s in stages[w::workers]) for w in range(workers)]
    most = max(range(workers), key=lambda w: busy[w])
    first = stages[:workers]
    fill = sum(s.forward + s.arrives for s in first) - first[most].forward
    drain = sum(s.backward + s.returns for s in first) - first[most].backward
    return fill + microbatches * busy[most] + drain
