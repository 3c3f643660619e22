"""A step of other software as a whole, against sums done by hand on a made-up cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from round_numbers import CLUSTER, GPU, NUMBERS, SIZES, L, computation, costs

from shardwise.cluster.cluster import Nodes
from shardwise.predict.closed_form.step_time import Costs
from shardwise.predict.hardware.constants import using
from shardwise.predict.profile.profile import Segment
from shardwise.predict.published.validate import explained
from shardwise.predict.runtime.block import block
from shardwise.splitting.schedule import BACKWARD, FORWARD

pytestmark = pytest.mark.usefixtures("round_numbers")

FEW = replace(SIZES, vocab=128)
"""Almost no work at the ends."""


@pytest.fixture
def products_alone(round_numbers: None) -> Iterator[None]:
    """Let memory and links take no time."""
    with using(replace(NUMBERS, memory_share=1e6, link_share=1e6, network_share=1e6)):
        yield


def stages_of(found: Costs) -> list[float]:
    """Return the seconds of one microbatch in each stage."""
    stages = found.parts.stages.values()
    return [found.stages.spent(s, FORWARD).device + found.stages.spent(s, BACKWARD).device for s in stages]


@pytest.mark.usefixtures("products_alone")
def test_bubble_of_a_pipeline() -> None:
    found = costs("pp=4,microbatches=8")
    stages, prediction = stages_of(found), found.prediction()
    assert max(stages) == stages[-1]  # it has the output
    assert prediction.compute_seconds == pytest.approx(8 * stages[-1], rel=1e-4)
    assert prediction.bubble_seconds == pytest.approx(sum(stages[:-1]), rel=1e-3)


@pytest.mark.usefixtures("products_alone")
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2)])
def test_interleaving_divides_the_bubble(schedule: str, chunks: int) -> None:
    found = costs(f"pp=4,microbatches=8,schedule={schedule}", FEW)
    whole = sum(stages_of(found))
    assert found.prediction().bubble_seconds == pytest.approx(3 / 4 * whole / chunks, rel=0.01)


def test_the_host_launches_kernels_and_exchanges() -> None:
    passes = block(SIZES, computation(tensor=8))
    with using(replace(NUMBERS, host_kernel=1.0, host_collective=100.0)):
        plain, again = costs("tp=8").times, costs("tp=8,recompute=full").times
        assert plain.forward.between(1, 2).launching == len(passes.forward) + 2 * 100
        assert plain.backward.between(1, 2).launching == len(passes.backward) + 2 * 100
        assert again.again(1, 2).launching == len(passes.forward) + 2 * 100
        assert costs("tp=8", graphs=True).prediction().host_seconds == 0


def test_the_host_runs_ahead_over_all_passes() -> None:
    # the loss of a vast vocabulary takes longer than the host needs for all kernels: only blocks before the first wait
    vast = replace(SIZES, vocab=100 * SIZES.vocab)
    kernels = sum(len((*s.layer.forward.kernels, *s.layer.backward.kernels)) for s in costs("dp=1").profile.segments)
    with using(replace(NUMBERS, host_kernel=2e-3)):
        few, many = costs("dp=1"), costs("dp=1", vast)
        passes = few.prediction()
        assert passes.step_seconds - passes.optimizer_seconds == pytest.approx(4 * kernels * 2e-3)
        assert passes.host_seconds == pytest.approx(4 * kernels * 2e-3 - passes.compute_seconds)
        assert many.times.forward.between(1, 2).device < len(block(vast, computation()).forward) * 2e-3
        blocks = many.times.forward.between(0, L + 1)  # of the first microbatch
        assert many.prediction().host_seconds == pytest.approx(blocks.launching - blocks.device)


def test_hosts_that_wait_for_messages_do_not_run_ahead() -> None:
    # each pass takes as long as its launches, in the bubble, too: m + p - 1 = 11 times a stage that launches most
    with using(replace(NUMBERS, host_kernel=1.0)):
        waits, ahead = (costs("pp=4,microbatches=8", FEW, overlap_pipeline=free).prediction() for free in (False, True))
        launches = [
            sum(len((*s.layer.forward.kernels, *s.layer.backward.kernels)) for s in segments)
            for segments in by_stage(costs("pp=4", FEW))
        ]
    bubble = sum(launches) - max(launches)
    assert waits.step_seconds == pytest.approx(8 * max(launches) + bubble, rel=0.01)
    assert waits.bubble_seconds == pytest.approx(bubble, rel=0.01)
    assert waits.host_seconds == pytest.approx(8 * max(launches), rel=0.01)
    assert ahead.step_seconds == pytest.approx(8 * max(launches), rel=0.1)


def by_stage(found: Costs) -> list[Sequence[Segment]]:
    """Return the segments of each stage."""
    return [found.profile.segments[stage.first : stage.end] for stage in found.parts.stages.values()]


def test_other_software_takes_the_host_that_was_measured_or_the_fitted_one() -> None:
    slow = replace(CLUSTER, nodes=(Nodes(replace(GPU, launch_seconds=1.0), 8, 4),))
    with using(replace(NUMBERS, host_kernel=2.0)):
        launching = [
            costs("dp=1", cluster=slow, fitted_host=fitted).times.forward.between(0, 1).launching
            for fitted in (True, False)
        ]
    assert launching == [2.0, 1.0]


@pytest.mark.parametrize("spelled", ["fsdp=2,zero=1,tp=4,pp=4,outermost=pp", "fsdp=32", "dp=4,tp=8", "pp=2"])
def test_terms_add_up(spelled: str) -> None:
    with using(replace(NUMBERS, host_kernel=1e-4, kernel_start=1e-5, network_hop=1e-5, collective_start=1e-4)):
        found = costs(spelled).prediction()
        assert sum(explained(found).values()) == pytest.approx(found.step_seconds)
