"""Conclusions of a comparison from the steps of trainings that took turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardwise.cluster.cluster import Device
from shardwise.commands.compare import comparison, samples, spread
from shardwise.errors import WorkerFailed
from shardwise.run.calibration.reference import Reference
from shardwise.run.training.in_turns import Turns, slice_steps
from shardwise.run.training.job import Job, Options
from shardwise.run.training.result import Forecast, Step, Trained
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

SIZE = 3


def steps(*seconds: float | None) -> list[Step]:
    return [Step(number, 0, 1.0 / number, None, None, 8, each) for number, each in enumerate(seconds, 1)]


def slices(*values: float) -> list[Step]:
    """Steps of a slice that warms up, then of one for each value, whose first step is slow."""
    return steps(9.0, 9.0, 9.0, *(each for value in values for each in (5 * value, value, value)))


def turns(strategy: str, taken: list[Step], predicted: float | None = None, **fields: Any) -> Turns:
    forecast = Forecast(predicted, 10, "" if predicted else "why")
    job = Job(
        source=Source(workload="small"),
        strategy=Strategy.parse(strategy),
        options=Options(),
        slice_steps=SIZE,
        forecast=forecast,
    )
    summary = {"memory_bytes": 20, "steps": len(taken), "loss": 1.0}
    return Turns(job, strategy, steps=taken, **{"trained": Trained(summary, tuple(taken), {}), **fields})


def document(*trainings: Turns, by_hand: tuple[Turns, ...] = (), **fields: Any) -> dict[str, Any]:
    return comparison(trainings, by_hand, [], workload="small", threads=1, groups=[], **fields)


def test_length_of_a_slice() -> None:
    assert [slice_steps(total) for total in (1, 20, 92, 10_000, None)] == [3, 3, 8, 50, 50]


def test_first_slice_and_first_step_of_each_warm_up() -> None:
    assert samples(slices(1.0, 2.0), SIZE) == [1.0, 2.0]
    assert samples(steps(7.0, 1.0, 3.0), SIZE) == [2.0], "there is no other slice"
    assert samples(steps(7.0), SIZE) == [7.0], "there is no other step"
    assert samples(steps(9.0, 9.0, 9.0, None, 4.0, 2.0), SIZE) == [2.0], "a profiled step is not timed"
    assert samples(steps(9.0, 9.0, 9.0, None, None, None), SIZE) == [9.0]
    assert samples([], SIZE) == []


def test_spread_is_that_of_the_middle_half() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 50.0]) == (2.0, 4.0)
    assert spread([1.0, 2.0, 3.0]) == (None, None)


def test_comparison_says_how_well_the_predictions_chose() -> None:
    found = document(turns("single", slices(2.0), 1.0), turns("dp=2", slices(1.0), 2.0))
    assert (found["chosen"], found["fastest"], found["regret"]) == ("single", "dp=2", 1.0)
    assert [row["error"] for row in found["results"]] == [-0.5, 1.0]
    assert [row["speedup"] for row in found["results"]] == [1.0, 2.0]
    assert "predicted_seconds" not in found["reasons"]
    assert found["equal"] is None
    assert found["reasons"]["equal"]
    nothing = document(turns("single", slices(2.0)))
    assert nothing["chosen"] is nothing["regret"] is None
    assert nothing["reasons"]["chosen"] == nothing["reasons"]["predicted_seconds"] == "why"


def test_predictions_at_the_pace_of_the_machine() -> None:
    found = document(turns("single", slices(2.0), 1.0), turns("dp=2", slices(1.0), 2.0), pace=1.5)
    assert found["pace"] == 1.5
    assert [row["error_at_pace"] for row in found["results"]] == [-0.25, 2.0]
    unknown = document(turns("single", slices(2.0), 1.0))
    assert unknown["pace"] is unknown["results"][0]["error_at_pace"] is None


def test_pace_is_that_of_the_reference() -> None:
    reference = Reference(0.5, 2)
    job = reference.job(4)
    assert (job.options.steps, job.strategy.workers) == (4 * job.slice_steps, 2)
    assert reference.pace([]) is None
    assert reference.pace([0.5, 0.75, 1.0]) == 1.5
    measured = Device(
        name="box", kind="cpu", flops={}, memory_bytes=1, memory_bandwidth=1.0, cores=2, launch_seconds=0.0,
        reference_seconds=0.5, reference_workers=2,
    )  # fmt: skip
    assert Reference.of(measured) == reference
    assert (
        Reference.of(replace(measured, reference_seconds=None)) is Reference.of(replace(measured, kind="gpu")) is None
    )


def test_what_lies_within_the_spread_is_equal() -> None:
    fast, near, far = (1.0, 1.1, 1.2, 1.3, 1.4), (1.1, 1.2, 1.3, 1.4, 1.5), (2.0, 2.1, 2.2, 2.3, 2.4)
    found = document(turns("single", slices(*far)), turns("dp=2", slices(*near)), turns("fsdp=2", slices(*fast)))
    assert found["fastest"] == "fsdp=2"
    assert found["equal"] == ["dp=2", "fsdp=2"]
    single = found["results"][0]
    assert (single["low"], single["measured_seconds"], single["high"]) == (2.1, 2.2, 2.3)
    assert single["spread_seconds"] == pytest.approx(0.2)
    assert found["samples"]["dp=2"] == list(near)
    assert found["rounds"] == 5


def test_plain_loops_stand_beside_slice_by_slice() -> None:
    ours, hand = turns("dp=2", slices(1.1, 2.2, 3.3)), turns("dp=2", slices(1.0, 2.0, 3.0))
    hand.name = "DDP by hand, 2 workers"
    (row,) = document(turns("single", slices(2.0)), ours, by_hand=(hand,))["by_hand"]
    assert (row["strategy"], row["beside"]) == ("DDP by hand, 2 workers", "dp=2")
    assert row["overhead"] == pytest.approx(0.1)


def test_a_failed_training_has_its_row_and_is_not_the_fastest() -> None:
    error = WorkerFailed("worker 1 was killed by SIGKILL", rank=1)
    failed = turns("dp=2", slices(1.0), 1.0, trained=None, error=error, failed=str(error), memory_bytes=7)
    found = document(turns("single", slices(2.0), 2.0), failed, interrupted=True)
    assert found["fastest"] == "single"
    assert found["interrupted"]
    row = found["results"][1]
    assert row["failed"] == "worker 1 was killed by SIGKILL"
    assert (row["steps"], row["measured_seconds"], row["measured_memory_bytes"]) == (6, 1.0, 7)
    nothing = document(turns("dp=2", [], trained=None, error=error, failed=str(error)))
    assert nothing["fastest"] is None
    assert nothing["rounds"] == 0
