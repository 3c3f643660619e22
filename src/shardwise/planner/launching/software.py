"""Launches of strategies by the software that they were planned for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.planner.launching import accelerate, deepspeed, megatron, torchtitan
from shardwise.planner.launching.launch import ChosenStrategy, Launch
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.runtime.profiles import ModuleProfiles, TransformerProfiles
from shardwise.predict.runtime.runtime import SHARDWISE
from shardwise.strategy import Strategy

LAUNCHES: Mapping[str, Callable[[ChosenStrategy], Launch]] = {
    "megatron": megatron.launch,
    "torchtitan": torchtitan.launch,
    "deepspeed": deepspeed.launch,
    "accelerate": accelerate.launch,
}
"""Functions that make the launch of a strategy, by the name of the software."""


def launch_document(profiles: ProfileSource, strategy: Strategy, cluster: Cluster) -> dict[str, Any]:
    """Return the JSON object of the launch of a strategy by the software whose profiles it was predicted from."""
    software = profiles.software
    assert software is not None
    settled = strategy.for_batch(profiles.workload.batch_size)
    chosen = ChosenStrategy(
        strategy=settled,
        workload=profiles.workload,
        cluster=cluster,
        profiles=profiles,
        transformer=profiles.transformer if isinstance(profiles, TransformerProfiles) else None,
        layer_class=profiles.traced.layer_class() if isinstance(profiles, ModuleProfiles) else "",
    )
    able = software.abilities
    return LAUNCHES[able.name](chosen).document(able.name, able.title)


def own_launch_document(workload: str, strategy: Strategy, settings: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object of Shardwise's own launch of a strategy.

    Args:
        workload: name of the workload.
        strategy: the strategy.
        settings: parameters of the workload's function, as --set takes them.
    """
    words = ["shardwise", "train", workload, "--strategy", str(strategy)]
    for setting in settings:
        words += ["--set", setting]
    return Launch(arguments=tuple(words)).document(SHARDWISE.name, "Shardwise")
