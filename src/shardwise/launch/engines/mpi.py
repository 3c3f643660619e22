"""Open MPI: ranks of `mpirun shardwise train ...`, and the launcher `--engine mpi`.

    variable                                   meaning
    OMPI_COMM_WORLD_RANK, _SIZE                this process among all workers of the job
    OMPI_COMM_WORLD_LOCAL_RANK, _LOCAL_SIZE    this process among those of its host
    OMPI_MCA_orte_hnp_uri                      number of the job, and the addresses of the host on which mpirun runs
    PMIX_NAMESPACE                             name of the job
    MASTER_ADDR, MASTER_PORT                   set by the user (`mpirun -x`): host and port at which the workers meet

Workers on several hosts meet on mpirun's own host, at its first worker there. If it has none, or the workers cannot
reach it, MASTER_ADDR names the host of rank 0 instead.

Source: https://docs.open-mpi.org/en/v4.1.x/faq/running.html
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shardwise.errors import RequestError
from shardwise.launch.host_watch import host_seconds
from shardwise.launch.launcher import Allocation, LaunchRequest, ProcessJob, no_script, not_installed
from shardwise.launch.ranks import LOOPBACK, SWITCH, RankContext, is_passed_on, number

RANK, SIZE = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Environment variables that workers on other hosts get too, beside those of `is_passed_on`."""

REACH_SECONDS = 10
"""Seconds that a host may take to answer before the job starts."""


def mpi_rank(env: Mapping[str, str]) -> RankContext | None:
    """Return the rank of this process under mpirun. Returns None if mpirun did not start it, or started it alone.

    Raises:
        RequestError: the variables contradict each other, or the hosts are several and mpirun's own is not known.
    """
    if RANK not in env or SIZE not in env or env[SIZE] == "1":
        return None
    rank, workers = number(env, RANK), number(env, SIZE)
    local_rank, local_workers = number(env, f"{_LOCAL}_RANK", 0), number(env, f"{_LOCAL}_SIZE", workers)
    port = number(env, "MASTER_PORT", 0)
    if local_workers == workers:
        address, keeps = LOOPBACK, rank == 0
    elif "MASTER_ADDR" in env:
        address, keeps = env["MASTER_ADDR"], rank == 0
    else:
        found = _addresses(env)
        address, keeps, port = ",".join(found), local_rank == 0 and any(map(_is_ours, found)), 0
    return RankContext(
        rank=rank,
        workers=workers,
        local_rank=local_rank,
        local_workers=local_workers,
        address=address,
        port=port,
        engine="mpi",
        key="" if port else f"mpi {env.get('PMIX_NAMESPACE', '')} {env.get('OMPI_MCA_orte_precondition_transports')}",
        keeps_store=keeps,
        switch=env.get(SWITCH, ""),
    )


_LOCAL = "OMPI_COMM_WORLD_LOCAL"


def _addresses(env: Mapping[str, str]) -> list[str]:
    """Return the addresses of mpirun's host: `1234.0;tcp://10.0.0.1,172.17.0.1:43211`. Raises RequestError."""
    match = re.search(r"tcp://([\d.,]+):\d+", env.get("OMPI_MCA_orte_hnp_uri", ""))
    if match is None:
        raise RequestError(
            "mpirun started workers on several hosts and does not say on which it runs itself: name the host of rank 0 "
            "(mpirun -x MASTER_ADDR=host)"
        )
    return match[1].split(",")


def _is_ours(address: str) -> bool:
    """Return whether an address is one of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


class MpiLauncher:
    """Launcher of jobs by Open MPI's mpirun: on this host, or on hosts that it reaches by ssh."""

    name = "mpi"

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return None: mpirun's own environment tells no number of workers."""
        return None

    def check(self, asked: LaunchRequest) -> None:
        """Check that mpirun is there, is Open MPI's, and reaches all hosts. Raises RequestError."""
        program = shutil.which("mpirun")
        if program is None:
            raise not_installed("mpi", "mpirun", "Open MPI (Debian: apt-get install openmpi-bin)")
        told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        if "Open MPI" not in told and "open-mpi" not in told:
            raise RequestError(
                f"engine mpi: {program} is not Open MPI's: put Open MPI's first in PATH (Debian: openmpi-bin)"
            )
        _check_hosts(asked)

    def start(self, asked: LaunchRequest) -> ProcessJob:
        """Start the job."""
        return ProcessJob(mpirun(asked), asked.environment, stop=signal.SIGUSR2)

    def script(self, asked: LaunchRequest) -> str:
        """Raise RequestError: mpirun starts a job at once."""
        raise no_script(self.name)


def mpirun(asked: LaunchRequest) -> list[str]:
    """Return the command line of mpirun for a job."""
    line = ["mpirun", "--np", str(asked.workers), "--bind-to", "none", "--oversubscribe"]
    if os.geteuid() == 0:
        line += ["--allow-run-as-root"]
    if not asked.hosts:
        return [*line, "--host", f"localhost:{asked.workers}", "--mca", "oob_tcp_if_include", "lo", *asked.command]
    slots = -(-asked.workers // len(asked.hosts))
    line += ["--host", ",".join(f"{host}:{slots}" for host in asked.hosts), *_keepalive(host_seconds())]
    passed = [name for name in asked.environment if name in MEETING or is_passed_on(name)]
    for name in passed:
        line += ["-x", name]  # its value is not in the command line, which others can read
    if "MASTER_ADDR" not in passed and not any(map(_is_here, asked.hosts)):
        line += ["-x", f"MASTER_ADDR={asked.hosts[0]}"]
    return [*line, *asked.command]


def _keepalive(seconds: float) -> list[str]:
    """Return the options that let mpirun give up a host just before its workers do after `seconds`.

    What it sends to a host that is gone keeps it waiting for a quarter of an hour, so it must notice it first.
    """
    pause = max(1, int(seconds / 15))
    first = max(1, int(seconds / 2))
    times = {"time": first, "intvl": pause, "probes": max(1, int((0.9 * seconds - first) / pause))}
    return [word for name, value in times.items() for word in ("--mca", f"oob_tcp_keepalive_{name}", str(value))]


def _is_here(host: str) -> bool:
    return host in ("localhost", socket.gethostname(), socket.getfqdn()) or host.startswith("127.")


def _check_hosts(asked: LaunchRequest) -> None:
    """Check that each host of the job can be reached as mpirun reaches it. Raises RequestError."""
    agent = asked.environment.get("OMPI_MCA_plm_rsh_agent", "ssh").split()
    others = [host for host in asked.hosts if not _is_here(host)]
    if others and shutil.which(agent[0]) is None:
        raise not_installed("mpi", agent[0], "an ssh client (Debian: apt-get install openssh-client)")
    if Path(agent[0]).name == "ssh":
        agent += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={REACH_SECONDS}"]
    with ThreadPoolExecutor(max_workers=32) as pool:
        reasons = list(pool.map(lambda host: _unreachable(agent, host), others))
    silent = [f"{host} ({reason})" for host, reason in zip(others, reasons, strict=True) if reason]
    if silent:
        raise RequestError(
            f"engine mpi: {', '.join(silent)} cannot be reached by {agent[0]}: nothing was started; "
            "each host must let you in without a password"
        )


def _unreachable(agent: list[str], host: str) -> str:
    """Return why a host cannot be reached. Returns an empty text if it can."""
    try:
        asked = subprocess.run(
            [*agent, host, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * REACH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {2 * REACH_SECONDS} s"
    if asked.returncode == 0:
        return ""
    return next(iter(asked.stderr.strip().splitlines()), f"exit status {asked.returncode}")
