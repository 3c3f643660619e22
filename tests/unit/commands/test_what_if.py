"""Numbers of the what-if panel are those of `simulate`, to the last digit."""

from __future__ import annotations

import pytest

from shardwise import api
from shardwise.cluster.find import find_cluster
from shardwise.commands.what_if import WhatIf, strategies_for, with_all_bandwidths
from shardwise.predict.simulate import profiles_on
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

WORKLOAD = "gpt:layers=2,hidden=64,heads=2,vocabulary=256,sequence=32,batch_size=8"


@pytest.fixture(scope="module")
def document() -> dict[str, object]:
    source = Source(workload=WORKLOAD)
    cluster = find_cluster("h100x4").with_margin(None)
    profiles = profiles_on(source.load(), cluster)
    return WhatIf(profiles, cluster, "h100x4", [Strategy.parse("dp=2,tp=2")], 4, 1e9).document(source)


@pytest.mark.parametrize(("devices", "bandwidth", "batch"), [(4, 1.0, 8), (2, 0.1, 16), (8, 10.0, 4), (1, 1.0, 8)])
def test_cells_are_what_simulate_says(document: dict[str, object], devices: int, bandwidth: float, batch: int) -> None:
    cells = document["cells"]
    assert isinstance(cells, list)
    cell = next(c for c in cells if (c["devices"], c["bandwidth"], c["batch"]) == (devices, bandwidth, batch))
    assert cell["candidates"]
    names = [each["strategy"] for each in cell["candidates"]]
    clusters = document["clusters"]
    assert isinstance(clusters, dict)
    said = api.simulate(
        WORKLOAD, names, cluster=clusters[str(devices)], bandwidth=bandwidth, settings={"batch_size": str(batch)}
    )
    for ours, theirs in zip(cell["candidates"], said["candidates"], strict=True):
        assert {key: theirs[key] for key in ours} == ours


def test_stops_are_around_the_workload(document: dict[str, object]) -> None:
    assert document["batch"] == [4, 8, 16]
    assert document["devices"] == [1, 2, 4, 8, 16]
    assert document["here"] == {"devices": 4, "bandwidth": 1.0, "batch": 8}
    assert document["command"] == f"shardwise simulate {WORKLOAD}"
    assert document["batch_setting"] == "batch_size"


def test_time_that_is_up_is_said() -> None:
    source = Source(workload=WORKLOAD)
    cluster = find_cluster("h100x4").with_margin(None)
    found = WhatIf(profiles_on(source.load(), cluster), cluster, "h100x4", [Strategy(dp=4)], 4, 0.0).document(None)
    assert len(found["cells"]) == 5  # the bandwidths cost next to nothing
    assert found["notes"] == ["70 of 75 settings were left out, to write this page in time."]
    assert "command" not in found


def test_given_strategies_spread_over_other_sizes() -> None:
    names = [str(each) for each in strategies_for(8, [Strategy.parse("dp=2,tp=2")], 8)]
    assert "dp=4,tp=2" in names
    assert {"dp=8", "fsdp=8", "tp=8"} <= set(names)
    assert [str(each) for each in strategies_for(1, [Strategy.parse("dp=2,tp=2")], 8)] == ["single"]


def test_bandwidths_of_all_links_change() -> None:
    cluster = find_cluster("h100x16")
    slower = with_all_bandwidths(cluster, 0.5)
    assert [level.bandwidth for level in slower.levels] == [level.bandwidth / 2 for level in cluster.levels]
    assert with_all_bandwidths(cluster, 1.0) is cluster
