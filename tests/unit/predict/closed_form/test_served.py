"""Costs of parameter servers: what is sent, who is busiest, and what memory they need."""

from __future__ import annotations

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.errors import StrategyError
from shardwise.predict.closed_form.served import message_seconds, server_bytes
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.simulate import played
from shardwise.predict.workers.traffic import communicated
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload

SPEC = "gpt:layers=4,hidden=128,heads=4,vocabulary=512,sequence=32,batch_size=16,precision=float32"


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    return Profiles(load_workload(SPEC), "cpu")


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return find_cluster("epyc-7763x8")


def costs(profiles: Profiles, cluster: Cluster, text: str) -> Costs:
    strategy = Strategy.parse(text).for_batch(profiles.workload.batch_size)
    return costs_of(profiles.of(strategy), strategy, cluster)


def test_gradients_and_parameters_are_sent_once_each(profiles: Profiles, cluster: Cluster) -> None:
    found = costs(profiles, cluster, "dp=4,ps=2")
    size = sum(each.bytes for each in found.profile.parameters if each.trained)
    counts = communicated(found.stages.program)
    assert counts["send", "ps", "push"] == counts["recv", "ps", "pull"] == (2, size)
    assert not any(when == "backward" for _, _, when in counts)


def test_servers_share_the_messages_of_all_workers(profiles: Profiles, cluster: Cluster) -> None:
    """One server is as busy as all workers together; as many servers as workers are no busier than a worker."""
    for servers, share in ((1, 4.0), (2, 2.0), (4, 1.0)):
        found = costs(profiles, cluster, f"dp=4,ps={servers}")
        pushed = found.stages.program.served(found.parts.workers[0])[:servers]
        one = sum(found.calls.of(each) for each in pushed)
        assert message_seconds(found.calls, pushed, 4) == pytest.approx(share * one, rel=0.25)
    exchanges = [
        costs(profiles, cluster, f"dp=4,ps={n}").finish(costs(profiles, cluster, f"dp=4,ps={n}").parts.workers[0])
        for n in (1, 2, 4)
    ]
    assert [each.exchange for each in exchanges] == sorted((each.exchange for each in exchanges), reverse=True)
    assert [each.update for each in exchanges] == sorted((each.update for each in exchanges), reverse=True)


def test_workers_hold_no_optimizer_state_and_servers_all_of_it(profiles: Profiles, cluster: Cluster) -> None:
    served, usual = costs(profiles, cluster, "dp=4,ps=1"), costs(profiles, cluster, "dp=4")
    assert served.memory.optimizer == 0
    assert served.memory.parameters == usual.memory.parameters
    size = sum(each.bytes for each in served.profile.parameters if each.trained)
    assert server_bytes(served.profile, served.strategy, served.parts.workers[0]) == pytest.approx(
        size * (1 + 1 + 4) + usual.memory.optimizer, rel=0.01
    )
    assert any("parameter server needs" in note for note in served.prediction().notes)


def test_slow_workers_without_a_bound_slow_nobody_else(profiles: Profiles, cluster: Cluster) -> None:
    seconds = {
        staleness: played(
            profiles, Strategy.parse(f"dp=4,ps=2,staleness={staleness}").for_batch(16), cluster, {1: 3.0}
        ).prediction.step_seconds
        for staleness in ("0", "2", "unbounded")
    }
    assert seconds["2"] == pytest.approx(seconds["0"], rel=0.1)
    assert seconds["unbounded"] < 0.8 * seconds["0"]


def test_more_servers_than_parameters_are_refused(profiles: Profiles, cluster: Cluster) -> None:
    with pytest.raises(StrategyError, match=r"ps=5000: the model has \d+ trained parameters: use ps=\d+ or fewer"):
        costs(profiles, cluster, "dp=2,ps=5000")
