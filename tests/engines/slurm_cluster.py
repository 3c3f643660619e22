"""A Slurm cluster of two nodes on this machine, with every file of it in one folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from daemons import READY_SECONDS, Daemons, free_ports

CONFIGURATION = """
ClusterName=shardwise
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
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
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4
NodeName=gone NodeHostname=gone NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1 State=DOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60 MaxTime=60 OverSubscribe=NO
PartitionName=high Nodes=n[1-2] PriorityTier=10 MaxTime=60
PartitionName=old Nodes=gone
"""


class SlurmCluster(Daemons):
    """Daemons of the cluster; they run from the creation of the object until `close`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
        (folder / "state").mkdir()
        folder.chmod(0o755)
        text = CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=free_ports(4))
        (folder / "slurm.conf").write_text(text)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
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
        self.start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            (self.folder / node).mkdir()
            self.start("slurmd", "-D", "-N", node)
        end = time.monotonic() + READY_SECONDS
        while "n[1-2] idle" not in self.ask("sinfo", "--noheader", "--partition=low", "--format=%N %T"):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """Return what one of Slurm's programs prints."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        ).stdout
