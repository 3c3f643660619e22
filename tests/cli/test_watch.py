"""A run that hangs or is held up says who does it; nothing of a local run can be reached over a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Run, processes_with, read_until, started

LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2"])
def test_a_worker_that_hangs_is_told_with_its_stack(strategy: str, run: Run, mark: str) -> None:
    arguments = ("--strategy", strategy, "--set", "fail=sleep", "--hang-timeout", "2", "--quiet")
    done = run("train", "work.py:small", *arguments, status=1)
    last = done.stderr.splitlines()[-1]
    assert re.match(r"shardwise: worker 1 has been in misbehave \(work.py:\d+\) for \d s; worker 0 waits in ", last)
    assert last.endswith("give --hang-timeout more than 2 s if it only needs longer")
    assert "time.sleep(100)" in done.stderr.splitlines()[-2]
    assert processes_with(mark) == []


def test_a_worker_that_is_stopped_is_told(run: Run, mark: str) -> None:
    arguments = ("--strategy", "dp=2", "--set", "fail=stop", "--hang-timeout", "2", "--quiet")
    done = run("train", "work.py:small", *arguments, status=1)
    assert done.stderr.splitlines()[-1].startswith("shardwise: worker 1 does not answer (stopped, or its host")
    assert processes_with(mark) == []


def test_a_slow_worker_is_told_while_it_is_slow(run: Run) -> None:
    arguments = (
        "--strategy",
        "dp=2",
        "--set",
        "slow=0.1",
        "--set",
        "pause=0.01",
        "--steps",
        "160",
        "--quiet",
        "--json",
    )
    done = run("train", "work.py:small", *arguments)
    (line,) = [line for line in done.stderr.splitlines() if "is slow" in line]
    assert re.match(r"shardwise: worker 1 is slow, mostly in loss \(work.py:\d+\): the others spend \d\d% of ", line)
    assert json.loads(done.stdout)["slow_workers"] == [line.removeprefix("shardwise: ")]


def test_nothing_of_a_local_run_listens_beyond_loopback(folder: Path, mark: str) -> None:
    with started("--strategy", "dp=2", "--set", "fail=wait") as process:
        read_until(process, "waiting")
        sockets = set(inodes([process.pid, *processes_with(mark)]))
        addresses = [address for address, inode in listening() if inode in sockets]
    assert addresses, "gloo's own connections are seen"
    assert all(re.fullmatch(r"[0-9A-F]{6}7F|0{24}01000000", address) for address in addresses)


def inodes(processes: list[int]) -> Iterator[str]:
    """Yield the socket inodes that processes have open."""
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            found = re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink()))
            if found:
                yield found[1]


def listening() -> Iterator[tuple[str, str]]:
    """Yield local address (hexadecimal, as the kernel shows it) and inode of each TCP socket that listens."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING:
                yield words[1].partition(":")[0], words[9]
