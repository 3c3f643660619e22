"""What a strategy costs at least, from sums over its profile alone: families that cannot win are not looked at closer.

    time     each worker computes its part of every microbatch; a pipeline without weights put off also fills once:
             step >= T (1 + (m - 1) / p), T the time of one microbatch through all stages, m microbatches, p workers
             (of several stages each: m T / p)
    memory   the mean over the workers of a pipeline: parameters and the optimizer's state, with the gradients (when it
             updates) or with what the backward pass needs of one microbatch (when that begins), whichever is more

Both hold for every member of a family, so that nothing is lost by leaving out what cannot be better than what is known.
"""

from __future__ import annotations

from shardwise.cluster.cluster import Cluster
from shardwise.predict.profile import Profile
from shardwise.predict.timing import timed
from shardwise.strategy import Strategy


def least_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Of a step, for all members of the family of `strategy` (its number of microbatches settled)."""
    times = timed(profile, cluster, strategy)
    one = times.forward.total[-1] + times.backward.total[-1] + times.weights.total[-1]
    count, workers = strategy.microbatches, strategy.pp
    if strategy.schedule in ("1f1b", "gpipe"):
        return one * (1 + (count - 1) / workers)
    return one * count / workers


def least_memory(profile: Profile, strategy: Strategy) -> float:
    """Bytes of the device that needs most, for this strategy."""
    key = ("least", "sums")
    if key not in profile.kept:
        whole = sum(parameter.bytes for parameter in profile.parameters)
        trained = [parameter for parameter in profile.parameters if parameter.trained]
        profile.kept[key] = whole, sum(p.bytes for p in trained), sum(p.elements for p in trained)
    found = profile.kept[key]
    assert isinstance(found, tuple)
    whole, gradients, elements = found
    slices = strategy.fsdp if strategy.splits_parameters else 1
    owners = strategy.replicas if strategy.zero == 1 else slices
    kept = 0 if strategy.recompute == "full" else profile.saved[-1]
    stays = whole / slices + elements * profile.update.state_bytes / owners
    return float((stays + max(gradients / slices, kept)) / strategy.pp)
