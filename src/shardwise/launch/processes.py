"""The processes of local workers: started each in a session of its own, watched, ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from shardwise.launch.allocator import starting
from shardwise.launch.context import LOCAL_WORKER

PROGRAM = Path(__file__).with_name("worker.py")

_FOREIGN = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
"""Variables of another launcher, left behind in the environment: they mean nothing to local workers."""


class Processes:
    """Local worker processes by rank, started at once."""

    def __init__(self, workers: int, address: str) -> None:
        """Start `workers` processes that connect to the switchboard at `address`."""
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(workers):
                self._processes.append(_start(rank, workers, address))
        except BaseException:
            self.kill()
            raise

    def __len__(self) -> int:
        return len(self._processes)

    def exits(self) -> dict[int, int]:
        """Return the exit status of each process that has ended, by rank; below 0: the signal that ended it."""
        polled = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: status for rank, status in polled.items() if status is not None}

    def stopped(self) -> list[int]:
        """Return the ranks whose processes are stopped (SIGSTOP); none where the system does not show it."""
        return [rank for rank, process in enumerate(self._processes) if _state(process.pid) in ("T", "t")]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each process that still runs."""
        for process in self._processes:
            process.send_signal(number)  # does nothing where it has been waited for

    def kill(self) -> None:
        """End all processes, stopped ones too, and what they started themselves; wait until they are gone."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # each is the head of its own group
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
    }
    # -P would keep this folder off the import path, but Python 3.10 does not know it: worker.py does it itself
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), address],
        stdin=subprocess.DEVNULL,
        env={**inherited, **starting(), **own},
        start_new_session=True,
    )


def _state(process: int) -> str:
    """Return the letter by which the system shows what a process does; empty where it does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
