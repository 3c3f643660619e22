"""The command as tests start it, and what it leaves running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""The fixture `run`."""

BOX = """
name = "box"
[devices.box]
name = "Box"
kind = "cpu"
memory_bytes = 10000000000
memory_bandwidth = 1e10
cores = 2
launch_seconds = 1e-5
flops = { float32 = 1e11 }
[[nodes]]
device = "box"
devices = 2
count = 1
[[levels]]
name = "loopback"
span = 2
bandwidth = 1e9
latency = 1e-5
"""
"""A cluster file: a host of two workers that nobody has measured."""


def command(*arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "shardwise", *arguments]


def hear_interrupts() -> None:
    """In a child before it starts: what runs the tests in the background may have them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_with(mark: str) -> list[int]:
    """Living processes that carry `mark` in their environment, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            marked = mark.encode() in (process / "environ").read_bytes()
        except OSError:
            continue
        if marked and state != "Z" and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Train the small workload in the background, and end it with the block."""
    process = subprocess.Popen(
        command("train", "work.py:small", "--quiet", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read standard error up to the line with `text`."""
    assert process.stderr is not None
    while text not in process.stderr.readline():
        assert process.poll() is None
