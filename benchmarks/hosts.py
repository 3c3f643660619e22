"""Hosts with slow links between them, on one machine: network namespaces, a pair of virtual devices, a shaped queue.

    host 0 ── core 0 ── 10.77.0.1 ── link0 ═══ tbf, both ways ═══ link1 ── 10.77.0.2 ── core 1 ── host 1

Each is a namespace of the network, with a name, an address and an equal share of the cores of its own. Both know each
other's names. Workers of one host talk over its loopback device, which is not shaped. All of it is gone when the
context ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PREFIX = "shardwise"
PORT = 29477
HOSTS = 2
BURST_SECONDS = 0.0005
"""Seconds of its rate that a link passes at once; at least `LEAST_BURST` bytes, a few frames: a real link passes none.
With more, small messages would cost nothing on a slow link. Larger pieces from the kernel are cut to frames."""
LEAST_BURST = 8 * 1024
QUEUE_SECONDS = 0.4
FILES = Path("/etc/netns")
"""Folder of the files that `ip netns exec NAME` shows in place of those in /etc, in a folder for each name."""


class NoHosts(RuntimeError):
    """This machine or this user cannot make hosts."""


@contextlib.contextmanager
def hosts(rate: float) -> Iterator[None]:
    """Two hosts with a link of `rate` bits per second between them.

    Raises:
        NoHosts: not root, or `ip` and `tc` are missing, or not enough cores.
    """
    if os.geteuid() != 0:
        raise NoHosts("network namespaces need root")
    for tool in ("ip", "tc", "nsenter"):
        if shutil.which(tool) is None:
            raise NoHosts(f"{tool} is missing: install iproute2 and util-linux")
    if len(cores()) < HOSTS:
        raise NoHosts(f"{len(cores())} core for {HOSTS} hosts: each needs one of its own")
    _remove()  # what an earlier run that was killed left behind
    try:
        _make(rate)
        yield
    finally:
        _remove()


def run_on_hosts(module: str, arguments: Sequence[str], per_host: int, environment: Mapping[str, str]) -> int:
    """Run `python -m module ARGUMENTS` as workers with torchrun's environment; return the largest exit status.

    Ends all of them when one fails, or this process is interrupted.
    """
    with started_on_hosts(module, arguments, per_host, environment) as workers:
        return _wait(workers)


@contextlib.contextmanager
def started_on_hosts(
    module: str, arguments: Sequence[str], per_host: int, environment: Mapping[str, str], **streams: Any
) -> Iterator[list[subprocess.Popen[Any]]]:
    """Start `python -m module ARGUMENTS` as workers with torchrun's environment, by rank; end them with the block."""
    size = HOSTS * per_host
    workers: list[subprocess.Popen[Any]] = []
    try:
        for rank in range(size):
            host, local = divmod(rank, per_host)
            own = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": local,
                "LOCAL_WORLD_SIZE": per_host,
                "GROUP_RANK": host,
                "MASTER_ADDR": address(0),
                "MASTER_PORT": PORT,
                "GLOO_SOCKET_IFNAME": device(host),
                "OMP_NUM_THREADS": max(1, len(share(host)) // per_host),
            }
            command = [*inside(host), sys.executable, "-m", module, *arguments]
            everything = {**os.environ, **environment, **{key: str(value) for key, value in own.items()}}
            workers.append(subprocess.Popen(command, env=everything, start_new_session=True, **streams))
        yield workers
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def cut_link() -> None:
    """Take the link between the hosts down: what is sent from now on is lost, and nobody is told."""
    _run("ip", "-n", name(1), "link", "set", device(1), "down")


def lose_all() -> None:
    """Let the link stay up, and lose all that is sent over it from now on: frames go to an address that nobody has."""
    for host in range(HOSTS):
        wrong = ("lladdr", "02:00:00:00:00:01", "dev", device(host), "nud", "permanent")
        _run("ip", "-n", name(host), "neighbour", "replace", address(1 - host), *wrong)


def set_rate(rate: float) -> None:
    """Give the link between the hosts another rate, in bits per second."""
    burst = max(LEAST_BURST, int(rate / 8 * BURST_SECONDS))
    shape = ("tbf", "rate", f"{int(rate)}bit", "burst", str(burst), "latency", f"{int(1e3 * QUEUE_SECONDS)}ms")
    for host in range(HOSTS):
        _run("tc", "-n", name(host), "qdisc", "replace", "dev", device(host), "root", *shape)


def cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def share(host: int) -> list[int]:
    """The cores of a host."""
    each = len(cores()) // HOSTS
    return cores()[host * each : (host + 1) * each]


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def device(host: int) -> str:
    return f"{PREFIX}-l{host}"


def name(host: int) -> str:
    """The name of a host, and of its namespace."""
    return f"{PREFIX}-{host}"


def inside(host: int) -> list[str]:
    """Begins a command line that runs on a host.

    Unlike `ip netns exec` it leaves /sys as it is, where slurmd looks for the groups of processes.
    """
    known = FILES / name(host) / "hosts"
    named = f'mount --bind {known} /etc/hosts && hostname {name(host)} && exec "$@"'
    pinned = ["taskset", "--cpu-list", ",".join(map(str, share(host)))]
    entered = ["nsenter", f"--net=/run/netns/{name(host)}", *pinned, "unshare", "--mount", "--uts"]
    return [*entered, "sh", "-c", named, "sh"]


def _make(rate: float) -> None:
    for host in range(HOSTS):
        _run("ip", "netns", "add", name(host))
        _run("ip", "-n", name(host), "link", "set", "lo", "up")
    _run("ip", "link", "add", device(0), "type", "veth", "peer", "name", device(1))
    names = "".join(f"{address(host)} {name(host)}\n" for host in range(HOSTS))
    for host in range(HOSTS):
        (FILES / name(host)).mkdir(parents=True)
        (FILES / name(host) / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
        _run("ip", "link", "set", device(host), "netns", name(host))
        _run("ip", "-n", name(host), "address", "add", f"{address(host)}/24", "dev", device(host))
        _run("ip", "-n", name(host), "link", "set", device(host), "up")
    set_rate(rate)


def _remove() -> None:
    for host in range(HOSTS):
        if Path("/run/netns", name(host)).exists():
            _run("ip", "netns", "delete", name(host))  # with its end of the link, and the other end with it
        shutil.rmtree(FILES / name(host), ignore_errors=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHosts(f"{' '.join(command)}: {done.stderr.strip()}")


def _wait(workers: Sequence[subprocess.Popen[Any]]) -> int:
    """Until all have ended, or one has failed."""
    left = list(workers)
    while left:
        for worker in list(left):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = worker.wait(0.1)
                left.remove(worker)
                if status:
                    return status
    return 0
