"""Two hosts with a link between them, and the ways to start workers on both: one command on each, or one for both."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ways import SHARDWISE

from benchmarks import hosts

Started = list[subprocess.Popen[str]]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
PORT = "29517"


def static(host: int) -> list[str]:
    """Return the options of torchrun with a static rendezvous."""
    return ["--node-rank", str(host), "--master-addr", hosts.address(0), "--master-port", PORT]


def elastic(host: int) -> list[str]:
    """Return the options of torchrun with an elastic rendezvous."""
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.name(0)}:29400", "--rdzv-id", "job"]
    return [*options, "--max-restarts", "0", "--local-addr", hosts.address(host)]


def torchrun(options: Sequence[str], host: int, *arguments: str) -> subprocess.Popen[str]:
    """Start torchrun on a host, which runs `shardwise ARGUMENTS` there."""
    return on_host(host, *TORCHRUN, *options, "-m", "shardwise", *arguments)


AGENT = """#!/bin/sh
# what ssh does, between the hosts: AGENT [-x] HOST COMMAND
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
case "$host" in
{hosts}
*) echo "no route to $host" >&2; exit 255 ;;
esac
"""


def mpi(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> subprocess.Popen[str]:
    """Start `shardwise ARGUMENTS` with --engine mpi for both hosts on the first one."""
    agent = folder / "agent"
    entries = (
        f'{hosts.name(host)}) exec {shlex.join(hosts.inside(host))} sh -c "$*" ;;' for host in range(hosts.HOSTS)
    )
    agent.write_text(AGENT.format(hosts="\n".join(entries)))
    agent.chmod(0o755)
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", str(agent))
    both = f"{hosts.name(0)},{hosts.name(1)}"
    return on_host(0, *SHARDWISE, *arguments, "--engine", "mpi", "--hosts", both)


def on_host(host: int, *line: str) -> subprocess.Popen[str]:
    """Start a command on a host."""
    return subprocess.Popen(
        [*hosts.inside(host), *line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def ended(started: Started) -> Iterator[Started]:
    """End what is left of processes, and of the hosts that they are on, with the block."""
    try:
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for host in range(hosts.HOSTS):
            kill_all(host)


def kill_all(host: int) -> None:
    """Kill all processes of a host."""
    for process in subprocess.run(
        ["ip", "netns", "pids", hosts.name(host)], capture_output=True, text=True, check=False
    ).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def await_steps(folder: Path, started: Started, steps: int) -> None:
    """Wait until the run in `folder` has done so many steps."""
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        gone = [process.communicate()[1] for process in started if process.poll() is not None]
        assert not gone, gone
        assert time.monotonic() < end
        time.sleep(0.05)


def told(errors: str) -> list[str]:
    """Return what Shardwise has said."""
    return [line.removeprefix("shardwise: ") for line in errors.splitlines() if line.startswith("shardwise: ")]


def again(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Shardwise on this machine."""
    return subprocess.run([*SHARDWISE, *arguments], capture_output=True, text=True, timeout=120, check=False)
