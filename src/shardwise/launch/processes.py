"""Processes of local workers: each starts in a session of its own, and ends together with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from shardwise.launch.allocator import starting
from shardwise.launch.context import LOCAL_WORKER
from shardwise.launch.scheduling import state_of

PROGRAM = Path(__file__).with_name("worker.py")

HASHES = "PYTHONHASHSEED"
"""Environment variable of the seed of text hashes, which decide the order of sets: it must be equal on all workers."""

_FOREIGN = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
"""Prefixes of another launcher's environment variables, which local workers must not inherit."""


class Processes:
    """Local worker processes by rank; creating the object starts all of them."""

    def __init__(self, workers: int, address: str) -> None:
        """Start `workers` processes that connect to the switchboard at `address`."""
        self._address = address
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(workers):
                self._processes.append(_start(rank, workers, address))
        except BaseException:
            self.kill()
            raise

    def __len__(self) -> int:
        return len(self._processes)

    def restart(self, rank: int) -> None:
        """Start a process that has ended again; what it started is killed before."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._processes[rank].pid, signal.SIGKILL)
        self._processes[rank] = _start(rank, len(self._processes), self._address)

    def exits(self) -> dict[int, int]:
        """Return the exit status of each process that has ended, by rank; -N means that signal N ended it."""
        polled = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: status for rank, status in polled.items() if status is not None}

    def stopped(self) -> list[int]:
        """Return the ranks whose processes are stopped (SIGSTOP). Returns no ranks on systems without /proc."""
        return [
            rank
            for rank, process in enumerate(self._processes)
            if state_of(Path("/proc", str(process.pid))) in ("T", "t")
        ]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each process that still runs."""
        for process in self._processes:
            process.send_signal(number)  # does nothing for a process that has been waited for

    def send_to_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes, and to all that they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)  # each worker leads a process group of its own

    def kill(self) -> None:
        """Kill all processes, including stopped ones and all that they started, and wait until they are gone."""
        self.send_to_all(signal.SIGKILL)
        for process in self._processes:
            process.wait()


def _start(rank: int, workers: int, address: str) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        LOCAL_WORKER: "1",
        HASHES: hashes if (hashes := os.environ.get(HASHES, "")).isdigit() else "0",
    }
    # -P would keep this folder off the import path, but Python 3.10 lacks it: worker.py removes the folder itself
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), address, str(rank)],
        stdin=subprocess.DEVNULL,
        env={**inherited, **starting(), **own},
        start_new_session=True,
    )
