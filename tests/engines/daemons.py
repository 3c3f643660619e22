"""Daemons of a cluster on this machine, with what they write in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

READY_SECONDS = 120.0


class Daemons:
    """Daemons that run until `close`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *arguments: str, before: Sequence[str] = ()) -> None:
        """Start a program, the tests' mark not in its environment; `before` begins its command line."""
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert program is not None, f"{name} is not installed: make engines"
        around = {key: value for key, value in os.environ.items() if key != "SHARDWISE_TEST_MARK"}
        with (self.folder / f"{Path(name).name}.out").open("ab") as output:
            self._running.append(
                subprocess.Popen(
                    [*before, program, *arguments],
                    env=around | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )

    def await_log(self, text: str, times: int = 1) -> None:
        """Wait until the daemons have written a text so often."""
        end = time.monotonic() + READY_SECONDS
        while self.logs().count(text) < times:
            assert time.monotonic() < end, self.logs()
            assert all(daemon.poll() is None for daemon in self._running), self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.[lo][ou][gt]")))

    def close(self) -> None:
        for daemon in reversed(self._running):
            daemon.terminate()
        for daemon in reversed(self._running):
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_ports(count: int) -> list[int]:
    """Ports in a row of which nobody uses the first one, other ones than other processes of pytest choose."""
    start = 16_000 + 10 * (os.getpid() % 200)
    for first in [*range(start, 19_000, 10), *range(16_000, start, 10)]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first))
            except OSError:
                continue
            return list(range(first, first + count))
    raise AssertionError("no ports are free")
