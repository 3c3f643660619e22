"""Launch of a strategy: the command and the files that software takes to run it.

They say what follows from the plan alone: degrees, batch, schedule, recomputation, precision, and the sizes of the
model where the software has one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.runtime.transformer import Transformer
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

TORCHRUN = "torchrun"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Command and files that run a strategy.

    Attributes:
        arguments: words of the command.
        files: name of a configuration file -> its text.
        environment: environment variables that the command needs.
        notes: lines about what the command and the files cannot say.
    """

    arguments: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def document(self, runtime: str, title: str) -> dict[str, Any]:
        """Return the JSON object of a launch by software with a name and a title."""
        return {
            "runtime": runtime,
            "title": title,
            "arguments": list(self.arguments),
            "files": dict(self.files),
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenStrategy:
    """A strategy with all that a launch of it depends on.

    Attributes:
        strategy: the strategy, with its number of microbatches settled.
        workload: the workload.
        cluster: the cluster.
        profiles: profiles that the strategy was predicted from.
        transformer: the model of the software. None if it runs the user's module.
        layer_class: name of the class of the module's repeated layers; empty if it is not known.
    """

    strategy: Strategy
    workload: Workload
    cluster: Cluster
    profiles: ProfileSource
    transformer: Transformer | None = None
    layer_class: str = ""

    @property
    def profile(self) -> Profile:
        """Return the profile that the strategy was predicted from."""
        return self.profiles.of(self.strategy)

    @property
    def samples(self) -> int:
        """Return the samples of a microbatch."""
        return self.workload.batch_size // self.strategy.replicas // self.strategy.microbatches

    @property
    def in_bf16(self) -> bool:
        """Return whether it computes in bfloat16."""
        return self.strategy.in_bf16(self.workload.precision)

    @property
    def hosts(self) -> tuple[int, int]:
        """Return (hosts, devices of each), as equal as hosts of the cluster's kind allow."""
        workers, size = self.strategy.workers, self.cluster.node_size
        each = max(number for number in range(1, min(workers, size) + 1) if workers % number == 0)
        return workers // each, each

    def torchrun(self) -> tuple[str, ...]:
        """Return the words with which torchrun starts the workers."""
        hosts, each = self.hosts
        return (TORCHRUN, "--nnodes", str(hosts), "--nproc-per-node", str(each))

    @property
    def host_notes(self) -> tuple[str, ...]:
        """Return what several hosts need beside the command; empty for one host."""
        hosts, each = self.hosts
        if hosts == 1:
            return ()
        return (f"start the command on each of the {hosts} hosts ({each} devices each), with its rank and an address",)
