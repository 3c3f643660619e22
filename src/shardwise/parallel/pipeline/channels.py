"""Process groups for the messages of a pipeline on GPUs: one for each pair of stages and each direction.

gloo matches messages by their tags. NCCL ignores tags: it runs the messages of two workers in one group one after the
other, in the order in which each of the two has posted them, whatever their direction. A receive that is posted ahead
would then hold up the very send that the other worker waits for, and both would wait for ever. In a group of its own,
each message from one stage to another is posted in the same order on both sides, because all schedules take the
microbatches of a stage in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline.stage import StepWork

Channels = Mapping[tuple[int, int], dist.ProcessGroup]
"""(stage that sends, stage that receives) -> the group of their messages. Gradients go from later stages to earlier."""


def open_channels(works: Iterable[StepWork], mesh: Mesh) -> Channels:
    """Open the channels of this worker's stages on GPUs. Collective over the workers of a pipeline.

    Returns no channels if the workers send by tag (on CPUs), or if there is no pipeline.
    """
    if mesh.group("pp") is None or mesh.device.type != "cuda":
        return {}
    return {pair: _opened(pair, mesh) for pair in pairs_of(works, mesh.strategy.pp, mesh.coordinate("pp"))}


def pairs_of(works: Iterable[StepWork], workers: int, worker: int) -> list[tuple[int, int]]:
    """Return the pairs of stages of which one is on `worker` and the other elsewhere, and that send each other values.

    They are in an order that all workers share, in which they can be opened without waiting in a circle.
    """
    found: set[tuple[int, int]] = set()
    for work in works:
        for target in range(len(work.stages)):
            sources = (source for source in range(target) if work.messages(source, target))
            found.update(pair for source in sources for pair in ((source, target), (target, source)))
    ends = {pair: {stage % workers for stage in pair} for pair in found}
    return sorted(pair for pair in found if worker in ends[pair] and len(ends[pair]) == 2)


def _opened(pair: tuple[int, int], mesh: Mesh) -> dist.ProcessGroup:
    """Open a channel, and send a first message on it: NCCL connects two workers then, which wait for each other."""
    group, workers = mesh.group("pp"), mesh.strategy.pp
    assert group is not None
    source, target = (dist.get_global_rank(group, stage % workers) for stage in pair)
    channel: Any = dist.new_group([source, target], use_local_synchronization=True)
    greeting = torch.zeros(1, device=mesh.device)
    if mesh.rank == source:
        dist.send(greeting, target, channel)
    else:
        dist.recv(greeting, source, channel)
    return channel  # type: ignore[no-any-return]
