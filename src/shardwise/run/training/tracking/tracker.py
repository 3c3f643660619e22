"""Interface of a tracker, which gets the metrics of a run besides the run's own files, and its protection.

    Log ── GuardedTracker ── EventFile                            TensorBoard: files, written at once
        ├─ BackgroundTracker ══ GuardedTracker ── WandbRun        in a thread: its service may be slow
        └─ BackgroundTracker ══ GuardedTracker ── MlflowRun       in a thread: its server may be slow

A tracker never ends a run: its first error is reported in one line, and it is not used again.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shardwise.errors import RunFolderError, one_line
from shardwise.run.jsonfile import entry, read_json, write_json

LONGEST_QUEUE = 10_000
"""Largest number of steps and evaluations that wait for a tracker in a thread; further ones are left out."""

OPENING_SECONDS, CLOSING_SECONDS = 20.0, 15.0
"""Seconds that the begin and the end of a run wait for a tracker in a thread at most."""

_MOST_BYTES = 1 << 16
"""Largest size of the file that holds a tracker's identity."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Place that gets the metrics of a run. Any method may raise, see `GuardedTracker`."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of optimizer step number `step` by name."""

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values measured on held-out data after `step` by name."""

    def close(self, *, failed: bool) -> None:
        """Record that the run ended, and wait until everything is written."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """Run as trackers see it.

    Attributes:
        folder: the run's folder.
        done: number of steps before this training; above 0 if the run is resumed.
        config: facts about the run by name, JSON-able: workload, strategy, workers, ...
        quiet: whether trackers print nothing.
    """

    folder: Path
    done: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = True

    def identity(self, tracker: str) -> str | None:
        """Return the id under which a tracker knows this run since an earlier training. Returns None if it has none.

        A damaged file counts as none, with a warning.
        """
        path = self._identity_file(tracker)
        if not path.exists():
            return None
        try:
            return entry(read_json(path, _MOST_BYTES, RunFolderError, "tracker's file"), "id", str)
        except (RunFolderError, ValueError) as error:
            logger.warning("%s: %s begins a new run", one_line(str(error)), tracker)
            return None

    def keep_identity(self, tracker: str, identity: str) -> None:
        """Keep the id under which a tracker knows this run, for a resume. Raises OSError."""
        write_json(self._identity_file(tracker), {"id": identity})

    def _identity_file(self, tracker: str) -> Path:
        return self.folder / f"{tracker}.json"


class GuardedTracker:
    """Tracker whose first error is reported in a warning and ends its use.

    Args:
        title: name of the tracker for the warning.
        make: function that opens the tracker.
    """

    def __init__(self, title: str, make: Callable[[], Tracker]) -> None:
        self._title = title
        self._tracker: Tracker | None = None
        with self._told():
            self._tracker = make()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step, see `Tracker`."""
        if self._tracker is not None:
            with self._told():
                self._tracker.step(step, values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of an evaluation, see `Tracker`."""
        if self._tracker is not None:
            with self._told():
                self._tracker.evaluation(step, values)

    def close(self, *, failed: bool) -> None:
        """Record that the run ended, see `Tracker`. Later calls do nothing."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._told():
                tracker.close(failed=failed)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Report an error of the tracker in one line, and do not use it again."""
        try:
            yield
        except Exception as error:
            tracker, self._tracker = self._tracker, None
            logger.warning("%s failed, the run goes on without it: %s", self._title, _reason(error))
            with contextlib.suppress(Exception):
                if tracker is not None:
                    tracker.close(failed=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return one_line(f"{type(error).__name__}: {error}")


class BackgroundTracker:
    """Guarded tracker in a thread of its own, so that a slow one delays no step.

    It is given OPENING_SECONDS to open, because importing a tracker's package slows down the steps beside it. If more
    than LONGEST_QUEUE records wait, further ones are left out, and one warning says so.

    Args:
        title: name of the tracker for warnings.
        make: function that opens the tracker; called in the thread.
        closing_seconds: longest time that `close` waits.
    """

    def __init__(self, title: str, make: Callable[[], Tracker], closing_seconds: float = CLOSING_SECONDS) -> None:
        self._title, self._make, self._closing_seconds = title, make, closing_seconds
        self._waiting: queue.Queue[Callable[[GuardedTracker], None] | None] = queue.Queue()
        self._full = False
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {title}", daemon=True)
        self._thread.start()
        self._open.wait(OPENING_SECONDS)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Let the thread record the values of a step."""
        self._put(lambda tracker: tracker.step(step, values))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Let the thread record the values of an evaluation."""
        self._put(lambda tracker: tracker.evaluation(step, values))

    def close(self, *, failed: bool) -> None:
        """Wait until everything is recorded, at most `closing_seconds`; a warning says if it took longer."""
        self._waiting.put(lambda tracker: tracker.close(failed=failed))
        self._waiting.put(None)
        self._thread.join(self._closing_seconds)
        if self._thread.is_alive():
            logger.warning(
                "%s has not written everything %g s after the end of the run: the rest is left out",
                self._title,
                self._closing_seconds,
            )

    def _put(self, record: Callable[[GuardedTracker], None]) -> None:
        if self._waiting.qsize() < LONGEST_QUEUE:
            self._waiting.put(record)
        elif not self._full:
            self._full = True
            logger.warning("%s is slower than the training: some steps are left out of it", self._title)

    def _work(self) -> None:
        tracker = GuardedTracker(self._title, self._make)
        self._open.set()
        while record := self._waiting.get():
            record(tracker)
