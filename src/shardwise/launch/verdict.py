"""Verdict over the states of all workers: does the job hang, which worker blocks it, and which is merely slow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SLOW_WAITS, OTHERS_WAIT = 0.15, 0.4
"""Limits of a slow worker: it waits at most the first share of its time, while the median of the others waits at least
the second."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the seconds that a worker may go without progress.

    Attributes:
        idle: seconds while no worker computes.
        busy: seconds while a worker computes, which may be a long operation or an endless loop.
    """

    idle: float
    busy: float


@dataclass(frozen=True, slots=True)
class State:
    """Answer of a worker to the question what it is doing.

    Attributes:
        stalled: seconds since its last progress.
        steps: number of times that it made progress.
        waiting: True if it sleeps in a collective or a point-to-point message, see `stacks.Activity`.
        busy: True if it used its processor in the last seconds.
        operation: name of the operation that it is in.
        stack: its innermost frames.
    """

    stalled: float
    steps: int
    waiting: bool
    busy: bool
    operation: str
    stack: str


@dataclass(frozen=True, slots=True)
class Hang:
    """Verdict that the job hangs: the rank that blocks it, that worker's stack, and a message of one line."""

    rank: int
    message: str
    stack: str


@dataclass(frozen=True, slots=True)
class Pace:
    """Pace of a worker in the last seconds: the share of time in which it waited, and its main operation otherwise."""

    waiting: float
    operation: str


def hang(states: Mapping[int, State | None], limits: Limits, hosts: Mapping[int, str]) -> Hang | None:
    """Return the worker that blocks the job. Returns None while some worker may still make progress.

    Args:
        states: state of each rank; None if it did not answer.
        limits: limits on the seconds that a worker may go without progress.
        hosts: rank -> host name, as far as it is known; for the message.
    """
    silent = [rank for rank, state in states.items() if state is None]
    answered = {rank: state for rank, state in states.items() if state is not None}
    working = {rank: state for rank, state in answered.items() if not state.waiting}
    if not silent and any(state.busy and state.stalled < limits.busy for state in working.values()):
        return None
    stalled = max((state.stalled for state in answered.values()), default=limits.idle)
    if silent:
        return _silent(silent, answered, stalled, hosts)
    if working:
        rank = min(working, key=lambda rank: (working[rank].busy, working[rank].steps, rank))
        state = working[rank]
        waiting = {other: each for other, each in answered.items() if other != rank}
        held = f"; {_doing(waiting)}" if waiting else ""
        message = f"worker {rank}{_at(rank, hosts)} has been in {state.operation} for {stalled:.0f} s{held}"
        return Hang(rank, message, state.stack)
    rank = min(answered, key=lambda rank: (answered[rank].steps, rank))
    message = f"all workers have waited for each other for {stalled:.0f} s: {_doing(answered)}"
    stacks = "".join(f"worker {rank}:\n{state.stack}" for rank, state in sorted(answered.items()))
    return Hang(rank, message, stacks)


def _silent(silent: list[int], answered: Mapping[int, State], stalled: float, hosts: Mapping[int, str]) -> Hang:
    names = " and ".join(f"worker {rank}{_at(rank, hosts)}" for rank in silent[:4])
    more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
    verb = "does" if len(silent) == 1 else "do"
    message = f"{names}{more} {verb} not answer (stopped, or its host cannot be reached) for {stalled:.0f} s"
    return Hang(silent[0], f"{message}; {_doing(answered)}" if answered else message, "")


def _at(rank: int, hosts: Mapping[int, str]) -> str:
    return f" on {hosts[rank]}" if len(set(hosts.values())) > 1 and rank in hosts else ""


def _doing(states: Mapping[int, State]) -> str:
    """Describe the operations that workers are in; ranks in equal operations are listed together."""
    by_operation: dict[str, list[int]] = {}
    for rank, state in sorted(states.items()):
        by_operation.setdefault(f"{'waits' if state.waiting else 'is'} in {state.operation}", []).append(rank)
    parts = []
    for operation, ranks in by_operation.items():
        named = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
        parts.append(f"worker{'s' if len(ranks) > 1 else ''} {named} {operation}")
    return "; ".join(parts)


def slow(paces: Mapping[int, Pace]) -> int | None:
    """Return the rank that the others wait for. Returns None if all keep pace, or if they wait for several."""
    if len(paces) < 2:
        return None
    rank = min(paces, key=lambda rank: paces[rank].waiting)
    others = [pace.waiting for other, pace in paces.items() if other != rank]
    return rank if paces[rank].waiting <= SLOW_WAITS and statistics.median(others) >= OTHERS_WAIT else None


def slow_message(rank: int, paces: Mapping[int, Pace]) -> str:
    """Format a line that says which worker is slow, where it spends its time, and how long the others wait for it."""
    others = statistics.median(pace.waiting for other, pace in paces.items() if other != rank)
    where = f", mostly in {paces[rank].operation}" if paces[rank].operation else ""
    return f"worker {rank} is slow{where}: the others spend {others:.0%} of their time waiting for it"


def to_json(value: State | Pace) -> dict[str, Any]:
    """Return the fields of a value as a dict that can be written to a board as JSON."""
    return {name: getattr(value, name) for name in value.__slots__}
