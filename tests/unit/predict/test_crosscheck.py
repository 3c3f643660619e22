"""The closed form says of each worker what the dry run of its program does: the same messages, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from dry_runs import shared
from traces import remembered

from shardwise.cluster.find import find_cluster
from shardwise.collective import Group
from shardwise.parallel.tensor import overlap
from shardwise.predict.closed_form import memory
from shardwise.predict.closed_form.fsdp_memory import StageMemory, held_at_segments
from shardwise.predict.closed_form.segment_times import Seconds
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.crosscheck import Crosscheck, counted, crosscheck
from shardwise.predict.hardware.times import delay, overlap_of
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.workers import passes, step_program
from shardwise.predict.workers.holdings import REPORT_BYTES, Stage
from shardwise.predict.workers.passes import EqualPasses
from shardwise.splitting.schedule import BACKWARD, FORWARD
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt
from shardwise.workload.recipes.image import image
from shardwise.workload.recipes.language import language
from shardwise.workload.recipes.medical import medical
from shardwise.workload.workload import Workload


def two_views() -> Workload:
    """Layers that a step passes through twice, and losses by name."""
    made = gpt(3, 64, 4, 2, vocabulary=256, sequence=32, batch_size=16)

    def step(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        once, again = (model(made.inputs(batch)) for _ in range(2))
        return {"next": made.loss(once, batch), "apart": (once - again).square().mean()}

    return replace(made, step=step)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "gpt": lambda: gpt(2, 256, 4, 2, vocabulary=1024, sequence=128, batch_size=16),
    "kept gpt": lambda: replace(
        gpt(3, 256, 8, 4, vocabulary=1024, sequence=128, batch_size=16), float32=("blocks.*.norm?", "norm", "head")
    ),
    "weighted gpt": lambda: replace(gpt(2, 64, 4, 2, vocabulary=256, sequence=32), weight=lambda _: torch.ones(())),
    "larger gpt": lambda: gpt(3, 512, 8, 4, vocabulary=4096, sequence=256, batch_size=16),
    "deep gpt": lambda: gpt(6, 256, 8, 4, vocabulary=1024, sequence=64, batch_size=16),
    "few tokens": lambda: gpt(2, 512, 8, 4, vocabulary=256, sequence=64, batch_size=4),
    "two views": two_views,
    "language": lambda: language(sequence=64, layers=2, hidden=64, tied=True, dropout=0.1),
    "image": lambda: image(batch_size=16),
    "resnet": lambda: image(model="resnet", batch_size=16),
    "medical": lambda: medical(batch_size=8, channels=4, patch=16, norm="batch"),
}

GRID = [
    *(
        ("gpt", strategy)
        for strategy in (
            "fsdp=3,zero=2,precision=float32",
            "fsdp=2,zero=1",
            "fsdp=2,tp=2,sp=1",
            "dp=2,pp=4",
            "fsdp=2,pp=2,schedule=zero-bubble,recompute=full",
            "tp=2,pp=2,sp=1",  # whose dry runs are those that `test_the_worker_that_needs_most_is_taken` needs
            "tp=2,pp=2,recompute=1/3",
            "dp=2,bucket=1",
            "fsdp=2,zero=1,microbatches=2,bucket=2",
            "dp=2,pp=2,schedule=interleaved,bucket=1",
            "tp=2,pp=2,sp=1,recompute=selective",
            "dp=2,fsdp=2,tp=2,pp=2",
            "dp=2,fsdp=2,tp=2,pp=2,outermost=pp",
        )
    ),
    *(
        ("kept gpt", strategy)
        for strategy in (
            "fsdp=2,tp=2",
            "dp=2,fsdp=2,pp=2,schedule=interleaved,microbatches=4",
            "fsdp=2,zero=2,microbatches=2,precision=autocast",
            "dp=2,precision=float32",
        )
    ),
    *(
        ("gpt", f"{strategy},reduce=bf16")
        for strategy in (
            "fsdp=2,zero=1",
            "dp=2,fsdp=2,tp=2",
            "fsdp=2,pp=2,schedule=interleaved,microbatches=4",
            "dp=2,pp=2,bucket=1",
        )
    ),
    ("kept gpt", "fsdp=2,pp=2,reduce=bf16"),
    *(("two views", strategy) for strategy in ("dp=2", "fsdp=2", "tp=2", "pp=2,microbatches=2")),
    ("language", "dp=2,pp=2,microbatches=2,recompute=full"),
    *(("image", strategy) for strategy in ("fsdp=2,tp=2", "pp=2")),
    *(("resnet", strategy) for strategy in ("fsdp=2", "dp=2,tp=2", "dp=2,recompute=selective")),
    ("medical", "pp=2,microbatches=2,schedule=interleaved"),
    *(("gpt", f"{axes},loss_pieces=3") for axes in ("tp=2,sp=1", "fsdp=2,zero=1")),
    ("language", "pp=2,schedule=zero-bubble,loss_pieces=2"),
    ("gpt", "fsdp=2,zero=1,states=8"),
    *(
        ("gpt", f"{axes},compress={kind}")
        for axes, kind in (
            ("dp=2", "powersgd:4"),
            ("dp=3", "sign"),
            ("dp=2,bucket=1", "topk:0.01"),
            ("dp=2,tp=2", "int8"),
            ("dp=2,pp=2,microbatches=2", "powersgd:4"),
            ("fsdp=2", "powersgd:4"),
            ("fsdp=3", "int8"),
            ("fsdp=2,microbatches=2", "topk:0.01"),
            ("dp=2,fsdp=2", "powersgd:4"),
            ("fsdp=2,zero=1", "fp8"),
            ("fsdp=2,tp=2", "sign"),
        )
    ),
    *(("kept gpt", f"{axes},compress=bf16") for axes in ("fsdp=2,pp=2", "dp=2")),
    *(
        ("gpt", strategy)
        for strategy in (
            "dp=2,local=4",
            "dp=2,local=1,outer=nesterov",
            "dp=2,local=4,fragments=2,delay=1",
            "dp=2,fsdp=2,local=4,outer=nesterov",
            "dp=2,fsdp=2,zero=1,local=4",
            "dp=2,tp=2,local=4,fragments=4",
            "dp=2,pp=2,local=2,outer=nesterov",
            "dp=2,fsdp=2,pp=2,outermost=pp,local=2",
        )
    ),
    ("weighted gpt", "dp=2,fsdp=2,local=2"),
    ("resnet", "dp=2,fsdp=2,local=2"),
]
"""Strategies that MEMORY_GRID does not have, or has for one stage of their pipeline."""


MEMORY_TOLERANCE = 0.05
MEMORY_GRID = [
    *(
        ("larger gpt", strategy)
        for strategy in (
            "single,microbatches=2",
            "dp=2",
            "dp=2,reduce=bf16",
            "dp=2,tp=2,microbatches=2,reduce=bf16",
            "dp=2,compress=powersgd:4",
            "fsdp=4",
            "fsdp=4,reduce=bf16",
            "fsdp=4,offload=1",
            "fsdp=2,zero=2",
            "fsdp=2,microbatches=2,recompute=selective",
            "dp=2,fsdp=2,microbatches=2,recompute=full",
            "fsdp=2,recompute=1/2",
            "tp=2,sp=1,recompute=full",
            "fsdp=2,tp=2",
            "pp=4",
            "pp=2,schedule=gpipe",
            "pp=2,schedule=interleaved",
            "pp=2,schedule=zero-bubble",
            "fsdp=2,pp=2",
            "fsdp=2,pp=2,zero=2,schedule=gpipe",
            "fsdp=2,pp=2,zero=2,schedule=interleaved",
            "fsdp=2,pp=2,schedule=interleaved,microbatches=8",
            "tp=2,pp=2,sp=1",
            "dp=2,pp=2,recompute=full",
            "single,microbatches=2,compile=1",
            "fsdp=4,compile=1",
            "fsdp=2,recompute=selective,compile=1",
            "dp=2,recompute=1/2,compile=1",
            "tp=2,sp=1,recompute=full,compile=1",
            "pp=2,schedule=zero-bubble,compile=1",
            "single,microbatches=2,loss_pieces=4",
            "fsdp=4,loss_pieces=4",
            "fsdp=2,zero=2,microbatches=2,loss_pieces=8",
            "fsdp=2,loss_pieces=4,recompute=selective",
            "tp=2,loss_pieces=4,recompute=full",
            "pp=2,loss_pieces=4,schedule=gpipe,recompute=full",
            "pp=2,loss_pieces=4",
            "single,microbatches=2,states=8",
            "fsdp=4,states=8",
            "fsdp=4,offload=1,states=8",
            "fsdp=2,pp=2,states=8",
        )
    ),
    # little is kept for the backward pass, so that the optimizer's copy of all parameters makes the peak
    *(("few tokens", strategy) for strategy in ("single", "dp=4,recompute=full", "tp=4", "fsdp=4,zero=1", "pp=2")),
    *(
        ("few tokens", f"{strategy},states=8")
        for strategy in ("single", "dp=4,recompute=full", "tp=4", "fsdp=4,zero=1", "pp=2")
    ),
    ("deep gpt", "fsdp=2,pp=2,schedule=interleaved,stages=3,microbatches=4"),
    *(("kept gpt", strategy) for strategy in ("single", "dp=2", "fsdp=2", "tp=2", "pp=2")),
    ("language", "tp=2"),
    ("image", "pp=2"),
    ("medical", "dp=2"),
]


@cache
def profiles(name: str, device: str, samples: int = 0) -> Profiles:
    workload = WORKLOADS[name]()
    return Profiles(replace(workload, batch_size=samples) if samples else workload, device)


def judge(name: str, strategy: str, pipeline_rank: int | None = None, cluster: str = "h100x16") -> Crosscheck:
    parsed = Strategy.parse(strategy)
    found = profiles(name, "gpu" if cluster.startswith("h100") else "cpu", 12 if parsed.replicas == 3 else 0)
    with shared(name):
        return crosscheck(found, parsed, find_cluster(cluster), pipeline_rank)


@pytest.mark.parametrize(("name", "strategy"), GRID)
def test_messages_are_the_same(name: str, strategy: str) -> None:
    for pipeline_rank in sorted({0, Strategy.parse(strategy).pp - 1}):
        document = judge(name, strategy, pipeline_rank).document()
        assert document["predicted"]["communicated"] == document["communicated"]
        assert document["bytes_agree"]
        assert document["order_agrees"]


@pytest.mark.parametrize(("name", "strategy"), MEMORY_GRID)
def test_memory_and_messages_are_the_same(name: str, strategy: str) -> None:
    document = judge(name, strategy).document()
    assert document["predicted"]["communicated"] == document["communicated"]
    assert document["bytes_agree"]
    assert document["order_agrees"]
    found = document["memory"], document["predicted"]["memory"]
    assert document["memory_error"] <= MEMORY_TOLERANCE, found


@pytest.mark.parametrize("strategy", ["fsdp=2,pp=2,microbatches=2", "fsdp=2,pp=4,microbatches=2"])
def test_memory_has_what_the_backward_pass_before_left_gathered(strategy: str) -> None:
    """A stage whose backward passes follow one another gathers in the first of them only, under any schedule."""
    document = judge("larger gpt", f"{strategy},recompute=full", 0).document()
    assert document["memory_error"] <= MEMORY_TOLERANCE


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=2,fsdp=2", "dp=2,tp=2", "fsdp=2,zero=1"])
def test_gradients_in_bfloat16_are_half_of_the_bytes(strategy: str) -> None:
    def reduced(options: str) -> int:
        found = judge("gpt", strategy + options).run.collectives
        return sum(
            each.bytes for each in found if each.when == "backward" and "reduce" in each.operation and each.axis != "tp"
        )

    assert 2 * reduced(",reduce=bf16") == reduced("")


def test_an_optimizer_that_needs_memory_for_a_moment_is_noticed() -> None:
    found = profiles("few tokens", "gpu")
    with remembered("few tokens"):
        profile = found.of(Strategy())
        assert profile.update.temporary_bytes == 4  # AdamW's root of the second moments
        saved = replace(profile, update=replace(profile.update, temporary_bytes=0.0))
    right = judge("few tokens", "single")
    wrong = costs_of(saved, Strategy(), find_cluster("h100x16")).memory
    assert wrong.tensors < (1 - MEMORY_TOLERANCE) * right.memory.total


@pytest.mark.parametrize(("recompute", "again"), [("none", 7), ("1/3", 7), ("full", 0), ("selective", 0)])
def test_inputs_are_gathered_again_unless_all_blocks_are_recomputed(recompute: str, again: int) -> None:
    """Two inputs of each block and that of the output layer."""
    run = judge("larger gpt", f"tp=2,sp=1,recompute={recompute}").run
    assert sum(each.operation == "all_gather" and each.asynchronous for each in run.collectives) == again


@pytest.mark.parametrize("strategy", ["tp=2,sp=1", "tp=4,sp=1,compile=1", "tp=2,sp=1,precision=float32"])
def test_gathered_inputs_of_layers_are_not_saved(strategy: str) -> None:
    """Two inputs of each block and that of the output layer are saved as this worker's part."""
    parsed, name = Strategy.parse(strategy), "larger gpt"
    right = judge(name, strategy)
    with mock.patch.object(overlap, "_saves_input", return_value=True):
        made = WORKLOADS[name]()
        wrong = crosscheck(Profiles(made), parsed, find_cluster("h100x16"))
    width = 4 if parsed.precision == "float32" else 2
    gathered = (3 * 2 + 1) * (16 * 256 * 512 * width)
    less = gathered * (parsed.tp - 1) // parsed.tp
    assert wrong.memory.activations - right.memory.activations == less
    assert wrong.run.memory.total - right.run.memory.total == pytest.approx(less, rel=0.05)
    assert [each.operation for each in right.run.collectives].count("all_gather") == 7 + sum(
        each.operation == "all_gather" for each in wrong.run.collectives
    )


def test_memory_that_is_not_counted_is_noticed() -> None:
    right = held_at_segments

    def without_gathers(*args: Any, **options: Any) -> list[StageMemory]:
        return [replace(held, gathered=0) for held in right(*args, **options)]

    with mock.patch.object(memory, "held_at_segments", without_gathers):
        assert judge("larger gpt", "fsdp=4,microbatches=2").document()["memory_error"] > MEMORY_TOLERANCE


@pytest.mark.parametrize("strategy", ["fsdp=2,tp=2,precision=float32", "pp=2,precision=float32"])
def test_a_cpu_sends_the_same(strategy: str) -> None:
    assert judge("gpt", strategy, cluster="epyc-7763x4").document()["bytes_agree"]


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=2,tp=2"])
def test_the_weight_of_a_batch_is_summed_over_replicas(strategy: str) -> None:
    run = judge("weighted gpt", strategy)
    axis = "fsdp" if "fsdp" in strategy else "dp"
    expected = {("all_reduce", axis, "weight"): (1, 8), ("all_reduce", "world", "report"): (1, REPORT_BYTES)}
    for found in (counted(run.run.collectives), run.communicated):
        assert {key: found[key] for key in found if key[2] in ("report", "weight")} == expected


def test_a_message_that_is_not_counted_is_noticed() -> None:
    with mock.patch.object(step_program, "report_bytes", return_value=16):
        assert not judge("gpt", "dp=2").document()["bytes_agree"]


def test_the_worker_that_needs_most_is_taken() -> None:
    found = judge("gpt", "tp=2,pp=2,sp=1")
    others = [judge("gpt", "tp=2,pp=2,sp=1", pipeline_rank).memory.total for pipeline_rank in range(2)]
    assert found.memory.total == max(others)
    assert found.run.rank == 2 * others.index(max(others))


def test_another_order_of_passes_is_noticed() -> None:
    def reversed_table(strategy: Strategy, pipeline_rank: int) -> tuple[EqualPasses, ...]:
        return passes.table(strategy, pipeline_rank)[::-1]

    assert judge("gpt", "fsdp=2,zero=1,microbatches=2,bucket=2").document()["order_agrees"]
    with mock.patch.object(step_program, "table", reversed_table):
        document = judge("gpt", "tp=2,pp=2,sp=1", 1).document()
    assert document["bytes_agree"]
    assert not document["order_agrees"]


def test_exchanges_have_one_price() -> None:
    """The prefix sums of the closed form are the exchanges of the step program without what computing hides of them."""
    cluster = find_cluster("h100x16")
    with remembered("gpt"):
        strategy = Strategy.parse("tp=2,pp=2,sp=1,recompute=full").for_batch(16)
        costs = costs_of(profiles("gpt", "gpu").of(strategy), strategy, cluster)
    for stage in costs.parts.stages.values():
        for kind in (FORWARD, BACKWARD):
            alone = costs.stages.program.exchanges(stage, kind, range(stage.first, stage.end))
            spent = costs.stages.spent(stage, kind).exchanges
            hidden = _hidden(costs, stage) if kind == BACKWARD else 0.0
            assert spent == pytest.approx(sum(map(costs.calls.of, alone)) - hidden)
            assert spent > 0
            assert (hidden > 0) == (kind == BACKWARD)


def _hidden(costs: Costs, stage: Stage) -> float:
    """Return the seconds of a stage's exchanges in its backward pass that computing hides."""
    found, seconds = 0.0, Seconds.on(costs.profile, costs.cluster, costs.strategy)
    for segment in costs.profile.segments[stage.first : stage.end]:
        for each in segment.layer.backward.exchanges:
            alone = costs.calls.collective(each.operation, each.bytes, Group(costs.strategy.tp))
            beside = sum(map(seconds.kernels.seconds, each.beside))
            found += alone - delay(alone, beside, overlap_of(seconds.device))
    return found
