"""Slurm: ranks of `srun shardwise train ...`, and the launcher `--engine slurm`.

    variable                                      meaning
    SLURM_STEP_ID                                 number of the step in its job; not set in a batch script itself
    SLURM_PROCID, SLURM_STEP_NUM_TASKS            this process among all workers of the step
    SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE      this process among those of its node; tasks of each node: `2(x3),1`
    SLURM_NODEID, SLURM_STEP_NODELIST             number of its node, and the step's nodes in that order: `n[1-3,7]`
    SLURM_JOB_ID, SLURM_RESTART_COUNT             number of the job, and how often it has been requeued
    SLURM_TOPOLOGY_ADDR, ..._PATTERN              its node and the switches above it, outermost first: `s0.s1.n7`
    SLURM_NTASKS, SLURM_TASKS_PER_NODE            tasks that the allocation was made for, and those of each node

Workers meet on the step's first node, at its first worker, whatever rank that has.

Source: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Mapping

from shardwise.errors import RequestError
from shardwise.launch.launcher import Allocation, LaunchRequest, ProcessJob, has_option, not_installed
from shardwise.launch.ranks import LOOPBACK, SWITCH, RankContext, number

SPECIAL_STEPS = 0xFFFFFFF0
"""Number from which on a step is no set of workers: batch scripts, interactive shells (slurm.h, SLURM_BATCH_SCRIPT)."""

ASK_SECONDS = 30
"""Seconds that one of Slurm's programs may take to answer."""

PACKAGE = "Slurm's client programs (Debian: apt-get install slurm-client)"


def slurm_rank(env: Mapping[str, str]) -> RankContext | None:
    """Return the rank of this process in a step of Slurm. Returns None if it is in no step, or alone in one.

    Raises:
        RequestError: the variables contradict each other, or only a part of them is set.
    """
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    step, workers = number(env, "SLURM_STEP_ID"), number(env, "SLURM_STEP_NUM_TASKS", 1)
    if step >= SPECIAL_STEPS or workers == 1:
        return None
    node, local_rank = number(env, "SLURM_NODEID"), number(env, "SLURM_LOCALID")
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node >= len(counts):
        raise RequestError(
            f"SLURM_NODEID={node} and SLURM_STEP_TASKS_PER_NODE={env.get('SLURM_STEP_TASKS_PER_NODE')} contradict each "
            "other: start the workers with srun"
        )
    named = "MASTER_ADDR" in env and "MASTER_PORT" in env
    rank = number(env, "SLURM_PROCID")
    job = [env.get(name, "") for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    first = LOOPBACK if len(counts) == 1 else first_host(env.get("SLURM_STEP_NODELIST", ""))
    return RankContext(
        rank=rank,
        workers=workers,
        local_rank=local_rank,
        local_workers=counts[node],
        address=env["MASTER_ADDR"] if named else first,
        port=number(env, "MASTER_PORT") if named else 0,
        restarts=number(env, "SLURM_RESTART_COUNT", 0),
        engine="slurm",
        key="" if named else f"slurm {' '.join(job)}",
        keeps_store=rank == 0 if named else node == local_rank == 0,
        switch=_switch(env),
    )


def _switch(env: Mapping[str, str]) -> str:
    """Return the switches of this node, outermost first, or what SHARDWISE_SWITCH says of them.

    Slurm knows them where its administrator has described the network (topology/tree).
    """
    names = env.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = env.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    if len(names) == len(kinds) and kinds[:-1] and set(kinds[:-1]) == {"switch"}:
        return ".".join(names[:-1])
    return env.get(SWITCH, "")


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's spelling, in which `2(x3),1` is 2, 2, 2, 1."""
    found: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(tasks)] * int(times or 1)
    return found


def first_host(nodes: str) -> str:
    """Return the first host of a list in Slurm's spelling: `n[08-11,20],m1` gives `n08`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def node_address(name: str) -> str:
    """Return an address for a host's name; a node of Slurm that has no entry in the name service is asked of Slurm.

    Raises:
        OSError: neither knows it.
    """
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        match = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "--oneliner", "node", name))
        if match is None:
            raise
        return match[1]
    return name


def _ask(*command: str) -> str:
    """Return what one of Slurm's programs prints. Returns an empty text if it is not there or fails."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout


class SlurmLauncher:
    """Launcher of jobs by Slurm's srun: in the allocation that this process is in, or else in a new one."""

    name = "slurm"

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return the allocation. Returns None outside of one, or if it was made for no number of tasks."""
        if "SLURM_JOB_ID" not in environment or "SLURM_NTASKS" not in environment:
            return None
        tasks, nodes = number(environment, "SLURM_NTASKS"), tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", ""))
        return Allocation(tasks, tuple(nodes) if sum(nodes) == tasks else ())

    def check(self, asked: LaunchRequest) -> None:
        """Check that srun is there, and that allocation and nodes are as asked for. Raises RequestError."""
        if shutil.which("srun") is None:
            raise not_installed("slurm", "srun", PACKAGE)
        allocation = self.allocated(asked.environment)
        tasks = asked.workers if allocation is None else allocation.workers
        if tasks != asked.workers:
            raise RequestError(
                f"engine slurm: the strategy needs {asked.workers} workers, the allocation "
                f"{asked.environment['SLURM_JOB_ID']} was made for {tasks} tasks: use --workers {tasks}, or an "
                f"allocation with --ntasks {asked.workers}"
            )
        _check_nodes(asked.hosts)

    def start(self, asked: LaunchRequest) -> SlurmJob:
        """Start the job as one step."""
        return SlurmJob(asked)

    def script(self, asked: LaunchRequest) -> str:
        """Return a batch script for `sbatch`. A job that is requeued goes on from its newest checkpoint."""
        arguments = list(asked.arguments)
        if not has_option(arguments, "--resume"):
            arguments += ["--resume", "auto"]
        line = shlex.join([*srun(asked, name=""), *asked.command[:3], *arguments])
        if not has_option(arguments, "--out"):
            line += ' --out "runs/slurm-$SLURM_JOB_ID"'
        options = {
            "job-name": "shardwise",
            "ntasks": asked.workers,
            **({"nodelist": ",".join(asked.hosts)} if asked.hosts else {}),
            "output": "slurm-%j.out",
            "open-mode": "append",
            "signal": f"TERM@{round(asked.grace) + 60}",
        }
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
        return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", f"exec {line}", ""])


def srun(asked: LaunchRequest, *, name: str) -> list[str]:
    """Return the beginning of srun's command line for a job; an empty name leaves the job's own."""
    line = ["srun", f"--ntasks={asked.workers}"]
    if name:
        line += [f"--job-name={name}"]
    if asked.hosts and name:
        line += [f"--nodelist={','.join(asked.hosts)}", f"--nodes={len(asked.hosts)}"]
    return line


class SlurmJob(ProcessJob):
    """Step of Slurm. srun kills its tasks on SIGTERM, so that the request to end goes to Slurm itself."""

    def __init__(self, asked: LaunchRequest) -> None:
        self._name = f"shardwise-{uuid.uuid4().hex[:12]}"
        super().__init__([*srun(asked, name=self._name), *asked.command], asked.environment)

    def stop(self) -> None:
        """Tell all workers to write a checkpoint and end; a job that still waits for its nodes ends at once."""
        steps = _ask("squeue", "--steps", "--noheader", "--format=%i %j")
        found = [line.split()[0] for line in steps.splitlines() if line.split()[-1:] == [self._name]]
        if not found:
            super().stop()
        for step in found:
            _ask("scancel", f"--signal={signal.SIGTERM.name[3:]}", step)


def _check_nodes(hosts: tuple[str, ...]) -> None:
    """Check that Slurm knows each node, and that each answers. Raises RequestError."""
    if not hosts:
        return
    states = dict(
        line.split()[:2] for line in _ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines() if line
    )
    wrong = [f"{host} ({states.get(host, 'unknown')})" for host in hosts if _is_lost(states.get(host, ""))]
    if wrong:
        raise RequestError(
            f"engine slurm: {', '.join(wrong)} cannot be reached: nothing was started; sinfo --Node lists the nodes "
            "and their states"
        )


def _is_lost(state: str) -> bool:
    """Return whether a node in this state (sinfo's short form; `*` means that it does not answer) takes no job."""
    return not state or state.endswith("*") or state.startswith(("down", "fail", "drain", "drng", "boot", "unk"))
