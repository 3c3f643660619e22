"""The three views of a step agree: formulas, predicted events, and the events of the real program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
from dry_runs import shared
from hosts import quick
from traces import remembered

from shardwise.cluster.find import find_cluster
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.crosscheck import crosscheck
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.predict.dry_run.playback import played
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.timeline.events import Deadlock, Simulation
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt
from shardwise.workload.recipes.image import image
from shardwise.workload.workload import Workload

TOLERANCE = 0.05

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "small": lambda: gpt(2, 256, 4, 2, vocabulary=1024, sequence=128, batch_size=16),
    "wide": lambda: gpt(2, 2048, 16, 8, vocabulary=8192, sequence=512, batch_size=16),
    "image": lambda: image(batch_size=64),
}

MODULES = (
    "single,microbatches=2",
    "dp=2",
    "fsdp=4",
    "fsdp=4,zero=1",
    "fsdp=2,zero=2,microbatches=2",
    "dp=2,fsdp=2",
    "dp=2,recompute=full",
    "fsdp=2,recompute=selective",
)
GRAPHS = (
    "tp=2",
    "tp=2,sp=1",
    "pp=2",
    "pp=4,microbatches=4",
    "pp=2,schedule=gpipe",
    "pp=2,schedule=interleaved",
    "pp=2,schedule=zero-bubble",
    "dp=2,tp=2",
    "fsdp=2,pp=2",
    "fsdp=2,tp=2",
    "dp=2,pp=2,recompute=full",
)
IN_BF16 = ("single,microbatches=2", "dp=2", "dp=2,recompute=full", "fsdp=2,recompute=selective")
GRID = [
    *(("small", "epyc-7763x4", f"{strategy},precision=float32") for strategy in (*MODULES, *GRAPHS)),
    *(("wide", "h100x16", f"{strategy},precision=float32") for strategy in MODULES[:4]),
    *(("wide", "h100x16", f"{strategy},precision=bf16") for strategy in (*IN_BF16, *GRAPHS[:5:2])),
    *(("small", "h100x16", strategy) for strategy in ("tp=2", "pp=2,schedule=zero-bubble")),  # bound by launches
    *(  # bound by communication
        ("wide", "g5x16", f"{strategy},precision=float32")
        for strategy in ("dp=16", "fsdp=16", "fsdp=16,zero=1", "dp=2,fsdp=8", "fsdp=8,pp=2")
    ),
    *(
        ("wide", "g5x16", f"{strategy},precision=float32")
        for strategy in (
            "dp=16,local=1",
            "dp=16,local=8,outer=nesterov",
            "dp=16,local=8,fragments=2,delay=1",
            "dp=2,fsdp=8,local=4",
            "dp=4,tp=4,local=4",
        )
    ),
    *(("small", "epyc-7763x4", f"dp=2,{axis}local=4,precision=float32") for axis in ("", "pp=2,")),
    *(
        ("image", "h100x16", f"{strategy}{bf16}")
        for strategy in ("single", "fsdp=4")
        for bf16 in ("", ",precision=bf16")
    ),
]


@cache
def profiles(name: str, device: str) -> Profiles:
    return Profiles(WORKLOADS[name](), device)


def views(name: str, cluster: str, strategy: str) -> dict[str, Any]:
    found = profiles(name, "cpu" if cluster.startswith("epyc") else "gpu")
    with shared(name):
        return crosscheck(found, Strategy.parse(strategy), find_cluster(cluster), timed=True).document()


@pytest.mark.parametrize(("name", "cluster", "strategy"), GRID)
def test_three_views_of_a_step_agree(name: str, cluster: str, strategy: str) -> None:
    document = views(name, cluster, strategy)
    assert document["bytes_agree"]
    closed, timeline, dry = (document[f"{view}seconds"] for view in ("closed_form_", "timeline_", "step_"))
    assert document["time_errors"] == {"closed_form": closed / dry - 1, "timeline": timeline / dry - 1}
    assert max(map(abs, document["time_errors"].values())) <= TOLERANCE, document["time_errors"]


@cache
def ran(strategy: str) -> tuple[Costs, tuple[DryRun, ...]]:
    found, parsed = profiles("small", "gpu"), Strategy.parse(strategy)
    with remembered("small"):
        costs = costs_of(found.of(parsed), parsed, quick("h100x16"))
        ranks = range(parsed.pp)
        cuts = costs.parts.cuts
        runs = (dry_run(found.workload, parsed, parsed.rank(pp=rank), cuts=cuts, device="gpu") for rank in ranks)
        return costs, tuple(runs)


def step(strategy: str) -> Simulation:
    simulation = played(*ran(strategy))
    simulation.run()
    return simulation


def test_a_collective_that_is_priced_wrongly_is_noticed() -> None:
    with mock.patch("shardwise.predict.dry_run.playback.Prices.collective", return_value=0.0):
        errors = views("wide", "g5x16", "dp=16,precision=float32")["time_errors"]
    assert min(errors.values()) > TOLERANCE


def test_copies_and_clipping_under_zero_1_are_counted() -> None:
    errors = views("wide", "g5x16", "fsdp=16,zero=1,precision=float32")["time_errors"]
    assert max(map(abs, errors.values())) <= 0.01, errors


def test_a_worker_waits_for_the_stage_before_it() -> None:
    operations = step("pp=2,microbatches=2").done
    first = next(op for op in operations if op.worker == 0 and op.name == "0F0" and op.kind == "kernels")
    last = [op for op in operations if op.worker == 0 and op.name == "0F0" and op.kind == "kernels"][-1]
    second = next(op for op in operations if op.worker == 1 and op.name == "1F0" and op.seconds > 1e-5)
    assert first.start == pytest.approx(0.0, abs=1e-4)
    assert second.start > last.end


def test_messages_are_paired_by_their_tags() -> None:
    operations = [op for op in step("pp=2,microbatches=2").done if op.kind == "message"]
    sent, received = ([op for op in operations if op.name.startswith(kind)] for kind in ("send", "recv"))
    assert len(sent) == len(received) == 4  # of each microbatch, there and back
    assert sorted((op.start, op.end) for op in sent) == sorted((op.start, op.end) for op in received)


def test_gradients_are_reduced_while_the_backward_pass_runs() -> None:
    operations = step("fsdp=2").done
    scatters = [op for op in operations if op.kind == "reduce_scatter"]
    computed = [op for op in operations if op.stream == "compute" and op.name == "0B0"]
    assert len(scatters) == 3
    assert scatters[0].start < computed[-1].start
    gathers = [op for op in operations if op.kind == "all_gather" and op.name == "all_gather 0B0"]
    assert any(op.start < gather.start < op.end for gather in gathers for op in computed)  # the next block, meanwhile


def test_a_message_without_its_other_end_is_noticed() -> None:
    costs, (first, second) = ran("pp=2,microbatches=2")
    events = tuple(event for event in second.events if getattr(event.what, "operation", "") != "recv")
    assert len(events) == len(second.events) - 2
    kept = tuple(replace(event, after=()) for event in events)
    broken = replace(second, record=replace(second.record, events=kept))
    with pytest.raises(Deadlock, match="never takes part"):
        played(costs, (first, broken))


def test_ddp_waits_for_its_buckets() -> None:
    _, (run,) = ran("dp=2")
    reduced = [number for number, event in enumerate(run.events) if getattr(event.what, "axis", "") == "dp"]
    assert reduced
    waits = [event for event in run.events if set(reduced) <= set(event.after)]
    assert [event.mark for event in waits] == [""]  # the norm of the gradients
    assert all(event.after for event in run.events if getattr(event.what, "axis", "") == "dp")


def test_offloading_has_no_time() -> None:
    document = views("small", "h100x16", "fsdp=4,offload=1")
    assert document["step_seconds"] is document["time_errors"] is None
    assert any("offload=1" in note for note in document["notes"])
