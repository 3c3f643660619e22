"""Ranges of step times: from datasheets, from measurements, and in words."""

from __future__ import annotations

from dataclasses import replace
from math import hypot

import pytest

from benchmarks.errors import Rated, kept, pairs
from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve, Nodes, Sample
from shardwise.cluster.find import find_cluster
from shardwise.predict.document import step_words
from shardwise.predict.hardware.uncertainty import NINE_IN_TEN, errors, relative_error
from shardwise.strategy import Strategy


def measured(kernels: float, collectives: float) -> tuple[Cluster, Device]:
    curve = KernelCurve("memory", "float32", (Sample((1024,), 1e-6, kernels),), "copy")
    device = replace(find_cluster("epyc-7763x2").device(0), curves=(curve,))
    sends = CollectiveCurve("send", 2, 1, (Sample((1024,), 1e-6, collectives),))
    return Cluster(name="here", nodes=(Nodes(device, 2, 1),), levels=(), collectives=(sends,)), device


@pytest.mark.parametrize(
    ("text", "kind"), [("single", "data"), ("fsdp=8", "data"), ("dp=4,tp=2", "tensor"), ("tp=2,pp=4", "pipeline")]
)
def test_a_gpu_of_a_datasheet_errs_as_on_published_runs(text: str, kind: str) -> None:
    cluster = find_cluster("h100x8")
    found = relative_error(cluster, cluster.device(0), Strategy.parse(text), 0.1)
    assert found == errors()[kind]
    assert 0.02 < found < 0.5


def test_what_was_measured_errs_by_its_spread_too() -> None:
    cluster, device = measured(0.1, 0.4)
    quiet = relative_error(*measured(0.0, 0.0), Strategy(dp=2), 0.5)
    assert quiet == errors()["measured"]
    assert relative_error(cluster, device, Strategy(dp=2), 0.0) == pytest.approx(hypot(NINE_IN_TEN * 0.1, quiet))
    assert relative_error(cluster, device, Strategy(dp=2), 0.5) == pytest.approx(hypot(NINE_IN_TEN * 0.25, quiet))


SPREADS = {"step": 0.05, "sharded": 0.1, "stage": 0.2, "exchange": 0.3, "again": 0.4, "selective": 0.5, "crowded": 0.6}
"""Scatter of equal steps, by the overhead that the trainings of a calibration tell."""


@pytest.mark.parametrize(
    ("text", "scatter"),
    [
        ("single", 0.05),
        ("fsdp=2", 0.1),
        ("fsdp=2,zero=1", 0.05),
        ("pp=2", 0.2),
        ("tp=2", 0.3),
        ("dp=2,recompute=full", 0.4),
        ("dp=2,recompute=selective", 0.5),
        ("dp=4", 0.6),
        ("fsdp=2,pp=2", 0.6),
    ],
)
def test_equal_steps_scatter_as_trainings_that_do_the_same(text: str, scatter: float) -> None:
    cluster, device = measured(0.0, 0.0)
    found = relative_error(cluster, replace(device, cores=2, spreads=SPREADS), Strategy.parse(text), 0.0)
    assert found == pytest.approx(hypot(scatter, errors()["measured"]))


def test_a_cpu_that_was_not_measured_has_no_range() -> None:
    cluster = find_cluster("epyc-7763x2")
    assert relative_error(cluster, cluster.device(0), Strategy(dp=2), 0.0) is None


def test_a_step_is_told_with_its_range() -> None:
    from shardwise.predict.closed_form.step_time import predict
    from shardwise.predict.profile.profiler import Profiles
    from shardwise.workload.load import load_workload

    workload = load_workload("gpt:layers=1,hidden=64,heads=2,vocabulary=256,sequence=32,batch_size=4,precision=float32")
    found = predict(Profiles(workload).of(Strategy(dp=2)), Strategy(dp=2), find_cluster("a100x2"))
    assert step_words(found).endswith(f" ± {errors()['data']:.0%}")
    assert " ± " not in step_words(replace(found, error=None))
    assert found.precision == "float32"
    assert found.half_flops_utilization == pytest.approx(found.model_flops_utilization * 19.5 / 312)


def rated(text: str, predicted: float, measured: float, setting: str = "a") -> Rated:
    return Rated("group", setting, (Strategy.parse(text), None), predicted, measured)


def test_the_error_of_a_difference_is_that_of_the_ratio() -> None:
    """An error that both predictions have in common does not count."""
    runs = [rated("dp=4", 12.0, 10.0), rated("tp=4", 13.2, 10.0), rated("dp=4", 1.0, 9.0, "b"), rated("pp=4", 9.0, 9.0)]
    found = {pair.kind: pair for pair in pairs(runs)}
    assert [pair.kind for pair in pairs(runs)] == ["tensor", "pipeline", "pipeline"], "runs of one setting alone"
    assert found["tensor"].error == pytest.approx(0.1)
    assert found["tensor"].predicted == pytest.approx(0.1)


def test_equal_strategies_are_no_pair() -> None:
    assert not list(pairs([rated("dp=4", 12.0, 10.0), rated("dp=4", 12.0, 11.0)]))


def test_each_group_has_equal_weight() -> None:
    many = [("many", 0.1)] * 98 + [("few", 0.5), ("few", 0.2)]
    assert kept(many, 1 / 3) == 0.1
    assert kept(many, 0.7) == 0.2
    assert kept(many, 0.9) == 0.5
