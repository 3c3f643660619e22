"""Where the workers of a job read what the others are doing, also while their own main threads hang.

A board holds short texts under names. Local workers have a folder; those of another launcher have its TCP store, over a
connection of the board's own, because a store's connection is blocked while a main thread waits on it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

from shardwise.launch.context import RankContext

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_Answer = TypeVar("_Answer")

ANSWER_SECONDS = 5.0
"""How long a store may take to answer before it counts as out of reach."""


SAY_SECONDS = 3.0
"""How much later other ranks than the first tell an error, where they cannot learn whether it has told it."""


class OutOfReach(Exception):
    """The board cannot be reached: the host that keeps it is gone, or the link to it."""


class Board(Protocol):
    """Short texts by name, shared by all workers. Both methods raise OutOfReach."""

    def put(self, name: str, text: str) -> None:
        """Write `text` under `name`; the last one counts."""

    def get(self, name: str) -> str | None:
        """Return the text under `name`; None where there is none."""


class FolderBoard:
    """A board in a folder of this host."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def put(self, name: str, text: str) -> None:
        """Write `text` whole or not at all."""
        path = self._folder / f"board-{name}"
        partial = path.with_name(f".{path.name}")
        try:
            partial.write_text(text)
            partial.replace(path)
        except OSError as error:  # the parent is just removing it
            raise OutOfReach(str(error)) from error

    def get(self, name: str) -> str | None:
        """Return the text under `name`; None where there is none."""
        with contextlib.suppress(OSError):
            return (self._folder / f"board-{name}").read_text()
        return None


class StoreBoard:
    """A board in the TCP store at which the workers of another launcher met.

    Args:
        address: of the host that keeps the store.
        port: of the store.
        job: sets this job's texts apart from those of earlier attempts in the same store.
    """

    def __init__(self, address: str, port: int, job: str) -> None:
        self._address, self._port, self._job = address, port, job
        self._store: TCPStore | None = None

    def put(self, name: str, text: str) -> None:
        """Write `text` under `name`. Raises OutOfReach."""
        self._ask(lambda store: store.set(f"{self._job}/{name}", text))

    def get(self, name: str) -> str | None:
        """Return the text under `name`; None where there is none. Raises OutOfReach."""
        key = f"{self._job}/{name}"
        return self._ask(lambda store: store.get(key).decode() if store.check([key]) else None)

    def add(self, name: str) -> int:
        """Count up the number under `name`, which begins at 0, and return it. Raises OutOfReach."""
        return self._ask(lambda store: int(store.add(f"{self._job}/{name}", 1)))

    def _ask(self, question: Callable[[TCPStore], _Answer]) -> _Answer:
        """Return what the store answers.

        A store has no time limit of its own on most questions: where a link is cut, an answer never comes. So each
        question has a thread, which is left behind with its connection.
        """
        answers: SimpleQueue[_Answer | OutOfReach] = SimpleQueue()
        threading.Thread(target=lambda: answers.put(self._answer(question)), daemon=True).start()
        try:
            answer = answers.get(timeout=ANSWER_SECONDS)
        except Empty:
            answer = OutOfReach(f"{self._address}:{self._port} does not answer")
        if isinstance(answer, OutOfReach):
            self._store = None  # what was asked may still be answered: the connection is of no more use
            raise answer
        return answer

    def _answer(self, question: Callable[[TCPStore], _Answer]) -> _Answer | OutOfReach:
        try:
            if self._store is None:
                from torch.distributed import TCPStore  # type: ignore[attr-defined]

                limit = timedelta(seconds=ANSWER_SECONDS)
                self._store = TCPStore(self._address, self._port, is_master=False, timeout=limit)
            return question(self._store)
        except RuntimeError as error:
            return OutOfReach(str(error))


def board_of(context: RankContext) -> StoreBoard:
    """Return the board of the job in which `context` is one of the workers."""
    return StoreBoard(context.address, context.port, f"shardwise-{context.restarts}")


def is_to_say(context: RankContext) -> bool:
    """Return whether this worker tells an error that others of the job may have as well: the first one that asks does.

    torchrun ends all workers as soon as one has ended: what the first rank would say later is never said.
    """
    if context.elastic:
        with contextlib.suppress(OutOfReach):
            return board_of(context).add("said") == 1
    if context.rank:
        time.sleep(SAY_SECONDS)
    return True
