"""Parameters that an optimizer with states in 8 bits updates one by one (`states=8`)."""

from __future__ import annotations

from collections import Counter

from shardwise.parallel.optim.block_codes import LEAST
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.holdings import Worker, shard_bytes
from shardwise.splitting.ownership import assign_owners
from shardwise.strategy import Strategy


def updated_alone(profile: Profile, strategy: Strategy, worker: Worker) -> tuple[int, int]:
    """Return (elements of the largest, tensors) of the parameters that a worker updates one by one.

    Under zero=1 it is the replica that updates the most tensors.
    """
    indices = sorted({index for stage in worker.stages for index in profile.within(stage.first, stage.end)})
    held = [profile.parameters[index] for index in indices if profile.parameters[index].trained]
    sizes = {each.name: shard_bytes(each, strategy) // each.itemsize for each in held}
    shared = strategy.summing if strategy.zero == 1 else 1
    counts = Counter(owner for name, owner in assign_owners(sizes, shared).items() if sizes[name] >= LEAST)
    largest = max((size for size in sizes.values() if size >= LEAST), default=0)
    return largest, max(counts.values(), default=0)
