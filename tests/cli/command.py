"""The command as tests start it, and what it leaves running."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import warm

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


def processes_with(mark: str) -> list[int]:
    """Living processes that carry `mark` in their environment, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            marked = mark.encode() in (process / "environ").read_bytes() + warm.environment(process)
        except OSError:
            continue
        if marked and state != "Z" and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[warm.Started]:
    """Train the small workload in the background, and end it with the block."""
    line = command("train", "work.py:small", "--quiet", *arguments)
    process = warm.Started(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: warm.Started, text: str) -> None:
    """Read standard error up to the line with `text`."""
    assert process.stderr is not None
    while text not in process.stderr.readline():
        assert process.poll() is None
