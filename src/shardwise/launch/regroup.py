"""Regrouping of local workers: one that was killed is started again, and all of them form a process group anew.

    worker   {"restartable": true}     it can go on without another one, see `offer`
    parent   {"lost": rank}            that worker was killed, and is started again
    worker   {"ready": true}           of the one that was started again: it has loaded what it needs
    parent   {"regroup": generation}   to all others, which form the process group of this generation with it

Until they are told to regroup, the others go on as far as they can. A collective in which the killed worker is missing
fails, and `expected` tells such a failure from others. Workers of other launchers never regroup.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch import watch
from shardwise.units import parse_whole

RESTARTS_SETTING = "SHARDWISE_RESTARTS"
"""Environment variable with the number of workers that a run starts again, in total, after they were killed."""

RESTARTS = 3
"""Number of workers that a run starts again unless RESTARTS_SETTING says otherwise."""

TOLD_SECONDS = 5.0
"""Seconds in which the parent tells of a killed worker; a failure that nothing explains by then has another cause."""

RESTART_SECONDS = 300.0
"""Seconds that a worker may take from its start until it is ready to join the others."""

ALIVE_SECONDS = 1.0
"""Seconds between two notes of a waiting worker that it does not hang."""


class Regroup(Exception):
    """This worker is to form a process group anew with the others."""


@dataclass(slots=True)
class _Member:
    """This process among the local workers of its parent.

    Attributes:
        send: function that sends a JSON-able value to the parent.
        keep: function that lets the parent run a process beside it, see `launch.beside`; None: it does not.
        folder: folder in which the workers meet.
        rank: rank of this worker.
        workers: number of workers.
        joined: generation of the process group that this worker is in; the first one is 0.
        asked: generation that it is to be in.
        lost: ranks that were killed since this worker joined, in the order in which the parent told.
    """

    send: Callable[[dict[str, Any]], None]
    folder: str
    rank: int
    workers: int
    joined: int
    asked: int
    keep: Callable[[bytes, Any, str], None] | None = None
    lost: list[int] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)


_member: _Member | None = None


def restarts() -> int:
    """Return the number of killed workers that a run starts again. Raises RequestError if the setting is wrong."""
    text = os.environ.get(RESTARTS_SETTING, str(RESTARTS))
    try:
        count = parse_whole(text)
    except ValueError:
        count = -1
    if count < 0:
        raise RequestError(f"{RESTARTS_SETTING}={text}: must be a whole number, 0 or more")
    return count if sys.platform == "linux" else 0  # a dead worker's peers notice it on Linux alone


def settle(
    send: Callable[[dict[str, Any]], None],
    keep: Callable[[bytes, Any, str], None],
    folder: str,
    rank: int,
    workers: int,
    generation: int,
    *,
    wanted: bool,
) -> None:
    """Register this process as a local worker; `generation` is the one that it is started for.

    `wanted` tells whether the parent starts killed workers again.
    """
    global _member
    if wanted:
        _member = _Member(send, folder, rank, workers, -1, generation, keep)


def hear(message: dict[str, Any]) -> None:
    """Take a message of the parent; the thread that hears it calls this."""
    assert _member is not None
    with _member.changed:
        if "lost" in message:
            _member.lost.append(message["lost"])
        else:
            _member.asked = message["regroup"]
        _member.changed.notify_all()


def keeper() -> Callable[[bytes, Any, str], None] | None:
    """Return the function by which the parent keeps a process beside it. Returns None if this worker keeps its own."""
    return None if _member is None else _member.keep


def possible() -> bool:
    """Return whether the parent starts killed workers again."""
    return _member is not None


def offer() -> None:
    """Tell the parent that this worker can go on without another one, and regroup with it."""
    if _member is not None:
        _member.send({"restartable": True})


def lost() -> tuple[int, ...]:
    """Return the ranks of the workers that were killed since this one joined the others."""
    return () if _member is None else tuple(_member.lost)


def generation() -> int:
    """Return the generation that this worker is to be in: the number of times that workers were started again."""
    return 0 if _member is None else _member.asked


def check() -> None:
    """Raise Regroup if this worker is to form a process group anew."""
    if _member is not None and _member.joined < _member.asked:
        raise Regroup


def before_meeting() -> None:
    """Wait for a worker that was killed, if there is one, before the workers meet. Raises Regroup."""
    if lost():
        assert _member is not None
        _await_asked(_member)
        check()


def expected(error: BaseException) -> bool:
    """Return whether an error of this worker comes of a worker that was killed and is started again.

    Waits for what the parent tells, at most TOLD_SECONDS: a failed collective may be noticed first.
    """
    if _member is None or _member.joined < 0:
        return False
    if isinstance(error, Regroup):
        return True
    with _member.changed:
        return _member.changed.wait_for(lambda: bool(_member and _member.lost), TOLD_SECONDS)


def begin() -> None:
    """Join the others, if this worker was started again; it has loaded what it needs. Collective."""
    if _member is not None and _member.joined < 0:
        join()


def join() -> None:
    """Form the process group of the generation that is asked for, once the parent asks for it. Collective.

    A worker that was started again tells the parent that it is ready. Raises ShardwiseError if nobody asks in time.
    """
    assert _member is not None
    import torch.distributed as dist

    from shardwise.launch.join import join_local  # only workers need it, and every start would take longer

    if _member.joined < 0:
        if _member.asked > 0:
            _member.send({"ready": True})
    else:
        _await_asked(_member)
        with contextlib.suppress(RuntimeError):  # of a group in which a worker is missing
            dist.destroy_process_group()
    with _member.changed:
        _member.joined, _member.lost = _member.asked, []
    join_local(str(Path(_member.folder, f"store-{_member.joined}")), _member.rank, _member.workers)


def _await_asked(member: _Member) -> None:
    waited = 0.0
    with member.changed:
        while member.joined >= member.asked:
            member.changed.wait(ALIVE_SECONDS)
            watch.alive()
            waited += ALIVE_SECONDS
            if waited > RESTART_SECONDS:
                raise ShardwiseError(
                    f"worker {member.lost[0]} was killed, and was not ready again within {RESTART_SECONDS:g} s"
                )
