"""torchrun: the launcher `--engine torchrun`, which runs torch's elastic agent for workers on this host.

On several hosts start `torchrun ... -m shardwise train ...` on each; its workers' ranks are in RANK and WORLD_SIZE
(`launch.context`), with a static and with an elastic rendezvous.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping

from shardwise.launch.launcher import Allocation, LaunchRequest, ProcessJob, no_hosts, no_script

AGENT = "shardwise.launch.engines.agent"
"""Module that is the agent."""


class TorchrunLauncher:
    """Launcher of jobs by torch's elastic agent, on this host."""

    name = "torchrun"

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return None: there is no allocation."""
        return None

    def check(self, asked: LaunchRequest) -> None:
        """Check that no hosts are asked for. Raises RequestError."""
        if asked.hosts:
            raise no_hosts(self.name, "start torchrun on each host, with -m shardwise train ...")

    def start(self, asked: LaunchRequest) -> ProcessJob:
        """Start the agent, which starts the workers."""
        command = [sys.executable, "-m", AGENT, str(asked.workers), f"{asked.grace:g}", *asked.command]
        return ProcessJob(command, asked.environment, end=signal.SIGINT)

    def script(self, asked: LaunchRequest) -> str:
        """Raise RequestError: torchrun starts a job at once."""
        raise no_script(self.name)
