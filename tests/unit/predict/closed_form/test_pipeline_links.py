"""Over slow links a pipeline is cut where there is least to send, and where links are fast by what layers cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_step_time import CLUSTER, DEVICE, layer, profile

from shardwise.cluster.cluster import Nodes
from shardwise.predict.closed_form.pipeline_links import slower_links
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.profile.profile import Segment
from shardwise.splitting.balance import divided
from shardwise.splitting.slow_links import much_slower
from shardwise.strategy import Strategy


def test_only_links_that_are_much_slower_count() -> None:
    assert much_slower([1e-9, 3e-9], 1e9) == ()
    first, second = much_slower([1e-9, 8e-8], 1e9)
    assert first == 1.0
    assert second == pytest.approx(80.0)
    assert much_slower([], 1e9) == ()


def test_a_slow_link_moves_the_cut_that_crosses_it() -> None:
    costs, messages = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [9, 9, 10**8, 9, 9]
    assert divided(costs, messages, 2, "cpu", in_blocks=False) == [[0], [3]]  # 0.1 s for the fairest cut
    slow = divided(costs, messages, 2, "cpu", slower=(20.0,), in_blocks=False)
    assert slow in ([[0], [2]], [[0], [4]])  # 2 s are too much
    assert divided(costs, messages, 3, "cpu", slower=(20.0, 1.0), in_blocks=False) == [[0], [2], [4]]


@pytest.mark.parametrize(
    ("strategy", "slow"),
    [
        ("pp=4", (False, True, False)),  # two workers on each of two hosts
        ("dp=2,pp=2", ()),
        ("dp=2,pp=2,outermost=pp", (True,)),
        ("pp=4,schedule=interleaved,microbatches=8", (False, True, False, True)),
        ("fsdp=4", ()),
    ],
)
def test_hops_of_two_hosts(strategy: str, slow: tuple[bool, ...]) -> None:
    fast, between = CLUSTER.levels
    levels = replace(fast, span=2, bandwidth=2.5e10), replace(between, span=4)
    hosts = replace(CLUSTER, nodes=(Nodes(DEVICE, 2, 2),), levels=levels)
    found = slower_links(profile(), Strategy.parse(strategy).for_batch(8), hosts)
    assert tuple(factor > 1 for factor in found) == slow


def test_a_prediction_cuts_by_the_links_of_its_cluster() -> None:
    """The fairest place to cut has 100 kB to send, the next ones 1 kB."""
    layers = tuple(layer(1e8) for _ in range(4))
    segments = (Segment(layers[0]), Segment(layers[1], 1000), Segment(layers[2], 100_000), Segment(layers[3], 1000))
    chain, strategy = profile(segments=segments), Strategy.parse("pp=2,microbatches=8")
    fast = replace(CLUSTER, levels=(replace(CLUSTER.levels[0], bandwidth=2.5e10),))
    slow = replace(CLUSTER, levels=(replace(CLUSTER.levels[0], bandwidth=1e5),))
    assert costs_of(chain, strategy, fast).parts.cuts == ((0,), (2,))
    assert costs_of(chain, strategy, slow).parts.cuts in (((0,), (1,)), ((0,), (3,)))
