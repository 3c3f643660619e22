"""Where the workers of a job read what the others are doing, also while their own main threads hang.

A board holds short texts under names. Local workers have a folder; those of another launcher have its TCP store, over a
connection of the board's own, because a store's connection is blocked while a main thread waits on it.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shardwise.launch.context import RankContext

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

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
        try:
            self._connected().set(f"{self._job}/{name}", text)
        except RuntimeError as error:
            raise self._lost(error) from error

    def get(self, name: str) -> str | None:
        """Return the text under `name`; None where there is none. Raises OutOfReach."""
        key = f"{self._job}/{name}"
        try:
            store = self._connected()
            return store.get(key).decode() if store.check([key]) else None
        except RuntimeError as error:
            raise self._lost(error) from error

    def add(self, name: str) -> int:
        """Count up the number under `name`, which begins at 0, and return it. Raises OutOfReach."""
        try:
            return int(self._connected().add(f"{self._job}/{name}", 1))
        except RuntimeError as error:
            raise self._lost(error) from error

    def _connected(self) -> TCPStore:
        if self._store is None:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            self._store = TCPStore(
                self._address, self._port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS)
            )
        return self._store

    def _lost(self, error: RuntimeError) -> OutOfReach:
        self._store = None  # what was asked may still be answered: the connection is of no more use
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
