"""A Slurm cluster of two nodes, on this machine or on hosts of it, with every file of it in one folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemons import READY_SECONDS, Daemons, free_ports

CONFIGURATION = """
ClusterName=shardwise
SlurmctldHost={first.host}({first.address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TopologyPlugin=topology/tree
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
{nodes}
NodeName=gone NodeHostname=gone NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1 State=DOWN
PartitionName=low Nodes={names} Default=YES PriorityTier=1 GraceTime=60 MaxTime=60 OverSubscribe=NO
PartitionName=high Nodes={names} PriorityTier=10 MaxTime=60
PartitionName=old Nodes=gone
"""


SWITCHES = """
{nodes}
SwitchName=none Nodes=gone
SwitchName=root Switches={switches},none
"""
"""Network of the cluster: each node at a switch of its own."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        name: its name.
        host, address: name and address of the host that it is on.
        inside: begins a command line that runs on that host.
        cpus: tasks that it takes.
    """

    name: str
    host: str
    address: str
    inside: Sequence[str] = ()
    cpus: int = 4


HERE = tuple(Node(name, socket.gethostname(), "127.0.0.1") for name in ("n1", "n2"))
"""Two nodes on this machine."""


class SlurmCluster(Daemons):
    """Daemons of the cluster; they run from the creation of the object until `close`."""

    def __init__(self, folder: Path, nodes: Sequence[Node] = HERE) -> None:
        super().__init__(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
        (folder / "state").mkdir()
        folder.chmod(0o755)
        ports = free_ports(4)
        lines = (
            f"NodeName={node.name} NodeHostname={node.host} NodeAddr={node.address} Port={port} CPUs={node.cpus}"
            for node, port in zip(nodes, ports[1:], strict=False)
        )
        names = ",".join(node.name for node in nodes)
        text = CONFIGURATION.format(folder=folder, ports=ports, first=nodes[0], nodes="\n".join(lines), names=names)
        (folder / "slurm.conf").write_text(text)
        switches = "\n".join(f"SwitchName=at-{node.name} Nodes={node.name}" for node in nodes)
        above = ",".join(f"at-{node.name}" for node in nodes)
        (folder / "topology.conf").write_text(SWITCHES.format(nodes=switches, switches=above))
        try:
            self._prepare(nodes)
        except BaseException:
            self.close()
            raise

    def _prepare(self, nodes: Sequence[Node]) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.folder}/munge.socket",
            f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid",
            f"--seed-file={self.folder}/munged.seed",
            f"--log-file={self.folder}/munged.log",
        )
        self.start("slurmctld", "-D", "-c", before=nodes[0].inside)
        for node in nodes:
            (self.folder / node.name).mkdir()
            self.start("slurmd", "-D", "-N", node.name, before=node.inside)
        end = time.monotonic() + READY_SECONDS
        idle = [*nodes[0].inside, "sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
        while self.ask(*idle).split() != ["idle"] * len(nodes):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """Return what one of Slurm's programs prints."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        ).stdout
