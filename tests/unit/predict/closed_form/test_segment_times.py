"""Workers of a pipeline that share cores leave theirs to others while they wait."""

from __future__ import annotations

import pytest

from shardwise.cluster.cluster import Cluster, Device, Level, Nodes
from shardwise.predict.closed_form.segment_times import Seconds
from shardwise.predict.profile.profile import Profile
from shardwise.strategy import Strategy

BOX = Device(
    name="box",
    kind="cpu",
    flops={"float32": 1e11},
    memory_bytes=2**34,
    memory_bandwidth=1e10,
    cores=2,
    launch_seconds=1e-6,
    shared={2: 1.5},
)


def cluster(local: int, hosts: int) -> Cluster:
    levels = (Level(name="within", span=local, bandwidth=1e9, latency=1e-5),)
    return Cluster(
        name="",
        nodes=(Nodes(BOX, local, hosts),),
        levels=(*levels, Level(name="between", span=local * hosts, bandwidth=1e8, latency=1e-4)),
    )


@pytest.mark.parametrize(
    ("spec", "local", "hosts", "busy"),
    [
        ("dp=4", 4, 1, 4),
        ("pp=2,microbatches=4", 2, 1, 2),  # a core for each
        ("pp=4,microbatches=8", 4, 1, 2 * 17 / 11),
        ("pp=4,microbatches=1", 4, 1, 2),  # one after the other, and a core is left
        ("pp=4,microbatches=4,schedule=interleaved", 4, 1, 2 * 17 / 11),
        ("dp=2,pp=2,microbatches=3", 4, 1, 2 * 6 / 4),
        ("dp=2,pp=2,microbatches=1", 4, 1, 2),
        ("dp=2,pp=2,microbatches=1,schedule=zero-bubble", 4, 1, 2 * 6 / 4),  # weights beside the other's gradients
        ("dp=4,pp=2,microbatches=1", 4, 2, 2),
        ("dp=4,pp=2,microbatches=1,outermost=pp", 4, 2, 4),  # a host has workers of one stage
        ("tp=4,pp=2,microbatches=1", 4, 2, 4),
        (
            "dp=2,pp=4,microbatches=4,outermost=pp",
            4,
            2,
            2 * 12 / 7,
        ),  # two stages on each host: one turn of two is longer
    ],
)
def test_so_many_compute_at_the_same_time(spec: str, local: int, hosts: int, busy: float) -> None:
    strategy = Strategy.parse(spec)
    profile = Profile(
        name="",
        tp=strategy.tp,
        sp=0,
        microbatch=1,
        precision="float32",
        device="cpu",
        batch_size=1,
        segments=(),
        parameters=(),
        values=(),
    )
    seconds = Seconds.on(profile, cluster(local, hosts), strategy)
    assert seconds.busy == pytest.approx(busy)
    assert seconds.crowd == local
