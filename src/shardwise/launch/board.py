"""Boards on which the workers of a job share their state, so that each can read it even while main threads hang.

A board holds short texts under names. Local workers share a folder. Workers of another launcher share its TCP store,
over a connection of the board's own, because a store's connection is blocked while a main thread waits on it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

from shardwise.errors import RequestError
from shardwise.launch.ranks import RankContext

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_Answer = TypeVar("_Answer")

ANSWER_SECONDS = 5.0
"""Seconds that a store may take to answer before it counts as out of reach."""


SAY_SECONDS = 3.0
"""Seconds by which ranks above 0 delay an error report if they cannot learn whether rank 0 has reported it."""


AFTER_SECONDS = 0.5
"""Seconds for which a worker that leaves an error report to another stays: launchers end all others when one ends."""

LOOK_SECONDS = 0.05
"""Seconds between two looks at who has asked."""


class OutOfReach(Exception):
    """The board cannot be reached: its host, or the network link to it, is gone."""


class Board(Protocol):
    """Interface of a board: short texts by name, shared by all workers. Both methods raise OutOfReach."""

    def put(self, name: str, text: str) -> None:
        """Write `text` under `name`, in place of an earlier one."""

    def get(self, name: str) -> str | None:
        """Return the text under `name`. Returns None if there is none."""


class FolderBoard:
    """A board in a folder of this host."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def put(self, name: str, text: str) -> None:
        """Write `text` under `name` in one atomic step. Raises OutOfReach."""
        path = self._folder / f"board-{name}"
        partial = path.with_name(f".{path.name}")
        try:
            partial.write_text(text)
            partial.replace(path)
        except OSError as error:  # the parent is removing the folder
            raise OutOfReach(str(error)) from error

    def get(self, name: str) -> str | None:
        """Return the text under `name`. Returns None if there is none."""
        with contextlib.suppress(OSError):
            return (self._folder / f"board-{name}").read_text()
        return None


class StoreBoard:
    """A board in the TCP store at which the workers of another launcher met.

    Args:
        address: address of the host that keeps the store.
        port: TCP port of the store.
        job: prefix that separates this job's texts from those of earlier attempts in the same store.
    """

    def __init__(self, address: str, port: int, job: str) -> None:
        self._address, self._port, self._job = address, port, job
        self._store: TCPStore | None = None

    def put(self, name: str, text: str) -> None:
        """Write `text` under `name`. Raises OutOfReach."""
        self._ask(lambda store: store.set(f"{self._job}/{name}", text))

    def get(self, name: str) -> str | None:
        """Return the text under `name`. Returns None if there is none. Raises OutOfReach."""
        key = f"{self._job}/{name}"
        return self._ask(lambda store: store.get(key).decode() if store.check([key]) else None)

    def add(self, name: str) -> int:
        """Increment the counter under `name`, which begins at 0, and return its new value. Raises OutOfReach."""
        return self._ask(lambda store: int(store.add(f"{self._job}/{name}", 1)))

    def _ask(self, question: Callable[[TCPStore], _Answer]) -> _Answer:
        """Return the store's answer to `question`. Raises OutOfReach after ANSWER_SECONDS.

        Most operations of a store have no time limit of their own: if the network link is cut, they never return. Each
        question therefore gets a thread of its own, which is abandoned with its connection at a timeout.
        """
        answers: SimpleQueue[_Answer | OutOfReach] = SimpleQueue()
        threading.Thread(target=lambda: answers.put(self._answer(question)), daemon=True).start()
        try:
            answer = answers.get(timeout=ANSWER_SECONDS)
        except Empty:
            answer = OutOfReach(f"{self._address}:{self._port} does not answer")
        if isinstance(answer, OutOfReach):
            self._store = None  # a late answer may still arrive on this connection, so it cannot be reused
            raise answer
        return answer

    def _answer(self, question: Callable[[TCPStore], _Answer]) -> _Answer | OutOfReach:
        try:
            if self._store is None:
                from torch.distributed import TCPStore  # type: ignore[attr-defined]

                # torch's own attempts write many lines about a host that is gone
                socket.create_connection((self._address, self._port), timeout=ANSWER_SECONDS).close()
                limit = timedelta(seconds=ANSWER_SECONDS)
                self._store = TCPStore(self._address, self._port, is_master=False, timeout=limit)
            return question(self._store)
        except (OSError, RuntimeError) as error:
            return OutOfReach(str(error))


def board_of(context: RankContext) -> StoreBoard:
    """Return the board of the job in which `context` is one of the workers. Raises RequestError if nobody answers."""
    from shardwise.launch.meeting import meet  # only workers need it, and every start would take longer

    met = meet(context)
    return StoreBoard(met.address, met.port, f"shardwise-{context.restarts}")


def is_to_say(context: RankContext) -> bool | None:
    """Return whether this worker reports an error; the first one to ask does. Returns None if nobody answers.

    It cannot always be rank 0: launchers end all workers as soon as one has ended, maybe before rank 0 can report.
    """
    from shardwise.launch.meeting import meet

    end = time.monotonic() + SAY_SECONDS
    try:
        meet(context, SAY_SECONDS)
        board = board_of(context)
        first = board.add("said") == 1
    except (OutOfReach, RequestError):
        time.sleep(max(0.0, end - time.monotonic()) if context.rank else 0.0)
        return None
    if not first:
        time.sleep(AFTER_SECONDS)
    return first


def stay(context: RankContext) -> None:
    """Keep the store for those that still ask who reports an error, at most SAY_SECONDS; nothing if others keep it."""
    if not context.keeps_store:
        return
    end = time.monotonic() + SAY_SECONDS
    with contextlib.suppress(OutOfReach, RequestError):
        board = board_of(context)
        while time.monotonic() < end and int(board.get("said") or 0) < context.workers:
            time.sleep(LOOK_SECONDS)
