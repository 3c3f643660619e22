"""Pipelines train what one process trains, under every schedule, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
from breaking import Breaking, assert_noticed
from equality import check
from models import ALL, ODDITIES, WORKLOADS, first
from pool import Pools
from random_models import random_workload

from shardwise.parallel.graph import graph_engine
from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.graph.parameters import LocalStages
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import divide
from shardwise.parallel.pipeline.executor import PipelineExecutor
from shardwise.parallel.pipeline.link_speed import measured_links
from shardwise.parallel.pipeline.weight_gradients import WeightGradients
from shardwise.parallel.program import Program
from shardwise.splitting import schedule
from shardwise.splitting.balance import Cuts
from shardwise.splitting.schedule import BACKWARD, FORWARD, INPUT
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


@pytest.mark.parametrize(
    "name",
    ["odd-vocabulary", "recurrent", "encoder", "encoder-tokens-first", "bottlenecks", "mobile", "signals",
     "regression", "classes-second", "smoothed", "separate"],
)  # fmt: skip
def test_every_model(workers: Pools, name: str) -> None:
    check(workers, WORKLOADS[name], "pp=2")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["unet", "tied", "translator", "perceptron", "resnet"])
def test_every_schedule(workers: Pools, name: str, schedule: str) -> None:
    check(workers, WORKLOADS[name], f"pp=2,schedule={schedule}")


@pytest.mark.parametrize("name", ODDITIES)
def test_what_models_do_now_and_then(workers: Pools, name: str) -> None:
    # a buffer that follows the samples does so microbatch by microbatch, and spectral norm by calls
    check(workers, ODDITIES[name], "pp=2,microbatches=1")


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
@pytest.mark.parametrize("name", ["shared", "without-gradient", "low-rank"])
def test_tensors_of_several_stages(workers: Pools, name: str, schedule: str) -> None:
    check(workers, ODDITIES[name], f"pp=2,schedule={schedule}")


@pytest.mark.parametrize(
    "strategy",
    [
        "pp=4",
        "pp=4,schedule=zero-bubble",
        "pp=2,schedule=interleaved,stages=3",
        "pp=4,speeds=1:2:1:4",
        "pp=2,schedule=interleaved,speeds=3:1",
    ],
)
@pytest.mark.parametrize("name", ["unet", "tied"])
def test_many_stages(workers: Pools, name: str, strategy: str) -> None:
    check(workers, WORKLOADS[name], strategy)


@pytest.mark.parametrize("recompute", ["full", "1/2", "selective"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("name", ["tied", "unet"])
def test_recomputation(workers: Pools, name: str, schedule: str, recompute: str) -> None:
    check(workers, WORKLOADS[name], f"pp=2,schedule={schedule},recompute={recompute}")


@pytest.mark.parametrize("strategy", ["pp=2", "pp=2,schedule=interleaved", "pp=2,schedule=zero-bubble"])
@pytest.mark.parametrize(("name", "samples"), [("tied", 13), ("smoothed", 13), ("perceptron", 9)])
def test_small_last_batches(workers: Pools, name: str, samples: int, strategy: str) -> None:
    check(workers, partial(first, name, samples), strategy)


@pytest.mark.parametrize("seed", range(12))
def test_random_models(workers: Pools, seed: int) -> None:
    check(workers, partial(random_workload, seed), f"pp=2,schedule={SCHEDULES[1 + seed % 2 * 2]}")


# ---- where to cut ---------------------------------------------------------------------------------------------------


def links_of(strategy: str) -> list[float]:
    return measured_links(Mesh.build(Strategy.parse(strategy)))


@pytest.mark.parametrize(
    ("count", "strategy", "hops"),
    [
        (2, "dp=2", 0),
        (2, "pp=2", 1),
        (2, "pp=2,schedule=interleaved", 2),
        (4, "dp=2,pp=2,outermost=pp", 1),
        (4, "pp=4,schedule=interleaved", 4),
    ],
)
def test_all_workers_know_the_same_links(workers: Pools, count: int, strategy: str, hops: int) -> None:
    found = workers(count, links_of, strategy)
    assert all(each == found[0] for each in found)
    assert len(found[0]) == hops
    assert all(0 <= seconds < 1e-5 for seconds in found[0])


def cuts_over(slowest: float, factory: Callable[[], Workload]) -> tuple[Cuts, list[float]]:
    """The cuts of two stages whose link takes so many seconds for a byte, and the bytes to send at each place."""
    links = mock.patch.object(divide, "measured_links", return_value=[slowest])
    agreed = mock.patch.object(divide, "_of_worker_0", wraps=divide._of_worker_0)
    with even_costs(), links, agreed as exchanged:
        engine = Program.build(factory(), Strategy.parse("pp=2")).engine
        assert isinstance(engine, GraphEngine)
        return engine.division.cuts, [place.bytes for place in exchanged.call_args.args[1]]


def test_a_slow_link_is_cut_where_least_crosses_it(workers: Pools) -> None:
    (fast, messages), _ = workers(2, cuts_over, 0.0, WORKLOADS["unet"])
    (slow, _), _ = workers(2, cuts_over, 1.0, WORKLOADS["unet"])
    assert messages[slow[1][0] - 1] == min(messages) < messages[fast[1][0] - 1]


# ---- broken on purpose ----------------------------------------------------------------------------------------------


def even_costs() -> Any:
    """Cuts that do not depend on what was measured."""
    return mock.patch.object(divide, "_timed", lambda step, tensors, data, used, repeats=3: [1.0] * len(used))


@contextmanager
def both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


def gradient_of_skip_lost() -> Any:
    send = PipelineExecutor._send

    def lossy(self: Any, action: Any, target: int, nodes: Any, tensors: Any) -> None:
        far = action.kind != FORWARD and action.stage - target > 1
        send(self, action, target, nodes, [tensor * 0 for tensor in tensors] if far else tensors)

    return both(even_costs(), mock.patch.object(PipelineExecutor, "_send", lossy))


def tied_not_added_up() -> Any:
    return both(even_costs(), mock.patch.object(LocalStages, "_sum", return_value=None))


def last_microbatch_dropped() -> Any:
    order = schedule.order

    def shorter(*args: Any, **kwargs: Any) -> Any:
        actions = order(*args, **kwargs)
        last = max(action.microbatch for action in actions)
        return [action for action in actions if action.microbatch != last]

    return mock.patch.object(graph_engine, "order", shorter)


def weights_never_computed() -> Any:
    compute = WeightGradients.compute

    def some(self: Any, key: tuple[int, int]) -> None:
        self._pending.pop(key, None) if key[1] == 1 else compute(self, key)

    return mock.patch.object(WeightGradients, "compute", some)


def one_gradient_of_several() -> Any:
    received = PipelineExecutor._received

    def last(self: Any, work: Any, action: Any) -> Any:
        values = received(self, work, action)
        if action.kind not in (BACKWARD, INPUT):
            return values
        return {node: value / max(1, len(work.stages) - 1 - action.stage) for node, value in values.items()}

    return both(even_costs(), mock.patch.object(PipelineExecutor, "_received", last))


@pytest.mark.parametrize(
    ("name", "strategy", "breaking"),
    [
        ("unet", "pp=4", gradient_of_skip_lost),
        ("unet", "pp=4", one_gradient_of_several),
        ("tied", "pp=2", tied_not_added_up),
        ("separate", "pp=2", last_microbatch_dropped),
        ("separate", "pp=2,schedule=zero-bubble", weights_never_computed),
    ],
)
def test_comparison_notices(workers: Pools, name: str, strategy: str, breaking: Breaking) -> None:
    assert_noticed(workers, ALL[name], strategy, breaking)
