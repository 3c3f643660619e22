"""Launchers by name, for `--engine`."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.errors import RequestError, nearest
from shardwise.launch.engines.kubernetes import KubernetesLauncher
from shardwise.launch.engines.mpi import MpiLauncher
from shardwise.launch.engines.ray import RayLauncher
from shardwise.launch.engines.slurm import SlurmLauncher
from shardwise.launch.engines.spark import SparkLauncher
from shardwise.launch.engines.torchrun import TorchrunLauncher
from shardwise.launch.launcher import Launcher

LOCAL = "local"
"""Name of the engine that is used without `--engine`: local workers, which the command starts itself."""

LAUNCHERS: dict[str, Callable[[], Launcher]] = {
    "torchrun": TorchrunLauncher,
    "mpi": MpiLauncher,
    "slurm": SlurmLauncher,
    "ray": RayLauncher,
    "spark": SparkLauncher,
    "kubernetes": KubernetesLauncher,
}
"""Launchers of other engines."""


def launcher_of(engine: str) -> Launcher:
    """Return the launcher of an engine other than `local`. Raises RequestError for an unknown one."""
    if engine not in LAUNCHERS:
        known = (LOCAL, *LAUNCHERS)
        raise RequestError(f"engine {engine}: known are {', '.join(known)}{nearest(engine, known)}")
    return LAUNCHERS[engine]()
