"""Attribute the time of a worker in a simulated step to compute, communication, bubble, optimizer and host."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardwise.predict.prediction import Prediction
from shardwise.predict.timeline.events import COMPUTE, Operation

PASSES = ("forward", "backward", "backward of inputs", "backward of weights")
_CLOSE = 1e-12
"""Seconds within which two times are considered equal."""


class Breakdown:
    """Finished operations of a simulation, grouped by worker.

    Args:
        done: operations of all workers, in the order in which they ended.
        received: receiving worker -> its messages.
        inline: whether devices are their own hosts, so that no separate wait for the host exists.
    """

    def __init__(self, done: Iterable[Operation], received: Mapping[int, Sequence[Operation]], *, inline: bool) -> None:
        self._inline = inline
        self._computed: dict[int, list[Operation]] = {}
        self._communicated: dict[int, list[Operation]] = {}
        self._received = received
        for operation in done:
            if operation.stream == COMPUTE:
                self._computed.setdefault(operation.worker, []).append(operation)
            elif operation.kind != "message":
                self._communicated.setdefault(operation.worker, []).append(operation)

    def computed(self, worker: int) -> float:
        """Return the seconds for which a worker computed."""
        return sum(operation.computing for operation in self._computed[worker])

    def prediction(self, worker: int, step: float, **others: Any) -> Prediction:
        """Return the prediction of the step as one worker saw it.

        Args:
            worker: index of the worker.
            step: seconds of the whole step.
            others: the fields of `Prediction` that do not follow from the simulated times.
        """
        computed, own = self._computed[worker], self._communicated.get(worker, [])
        messages = self._received.get(worker, ())
        passes = [operation for operation in computed if operation.kind in PASSES]
        updates = [operation for operation in computed if operation.kind == "optimizer"]
        optimizer = sum(operation.end - operation.start - operation.hosted for operation in updates)
        host = sum(operation.end - operation.start - operation.computing for operation in passes)
        host += sum(operation.hosted for operation in updates)
        host += sum(operation.end - operation.ready for operation in self._exchanges(own))
        exposed, waiting, idle = self._waits(computed, own)
        bubble = waiting + max(0.0, step - computed[-1].end)
        kinds = {kind: _seconds(o for o in computed if o.kind == kind) for kind in PASSES}
        sent = {kind: _seconds(o for o in own if o.kind == kind) for kind in dict.fromkeys(o.kind for o in own)}
        return Prediction(
            step_seconds=step,
            compute_seconds=sum(operation.computing for operation in passes),
            communication_seconds=sum(sent.values()) + _seconds(messages),
            exposed_communication_seconds=exposed,
            bubble_seconds=bubble,
            optimizer_seconds=optimizer,
            host_seconds=host + idle,
            terms={**{k: v for k, v in kinds.items() if v}, **sent, "messages": _seconds(messages)},
            **others,
        )

    def _exchanges(self, own: Iterable[Operation]) -> list[Operation]:
        return [operation for operation in own if operation.kind == "exchanges"]

    def _waits(self, computed: Sequence[Operation], own: Sequence[Operation]) -> tuple[float, float, float]:
        """Return the seconds in which a worker waits: (for communication, for other workers, for its host).

        Host time of tensor-parallel collectives is not part of the first.
        """
        exposed = waiting = idle = 0.0
        busy = _Busy(own)
        for operation in computed:
            if operation.idle < 0:
                continue
            gap, cause = operation.start - operation.idle, operation.cause
            late = cause is None or cause.end < operation.start - _CLOSE
            if late and not self._inline:
                idle += gap
                continue
            if cause is not None and cause.kind == "message" and not late:
                seen = max(0.0, cause.ready - max(cause.start, operation.idle))
            else:
                seen = busy.within(operation.idle, operation.start)
            exposed += seen
            waiting += gap - seen
        return exposed - sum(o.end - o.ready for o in self._exchanges(own)), waiting, idle


class _Busy:
    """Union of the time intervals of some operations."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start, end in sorted((operation.start, operation.end) for operation in operations):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def within(self, first: float, last: float) -> float:
        """Return the seconds between two times during which any of the operations runs."""
        total = 0.0
        for index in range(bisect_left(self._ends, first), len(self._starts)):
            if self._starts[index] >= last:
                break
            total += max(0.0, min(last, self._ends[index]) - max(first, self._starts[index]))
        return total


def _seconds(operations: Iterable[Operation]) -> float:
    return sum(operation.end - operation.start for operation in operations)
