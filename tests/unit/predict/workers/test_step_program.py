"""Memory holds the parameters that the step program gathers, in every backward pass and at every segment."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.predict.closed_form import fsdp_memory
from shardwise.predict.closed_form.fsdp_memory import held_at_segments
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.workers.holdings import Stage
from shardwise.predict.workers.passes import EqualPasses, Sync, turns
from shardwise.predict.workers.step_program import StepProgram, gathered_blocks, issued
from shardwise.splitting.schedule import BACKWARD, INPUT
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt

STRATEGIES = [
    "fsdp=4",
    "fsdp=2,zero=2",
    "dp=2,fsdp=2,microbatches=2",
    "fsdp=2,tp=2",
    "fsdp=2,tp=2,zero=2,microbatches=2",
    "fsdp=2,pp=2,microbatches=2",
    "fsdp=2,pp=2,microbatches=8",
    "fsdp=2,pp=2,microbatches=4,schedule=gpipe",
    "fsdp=2,pp=2,microbatches=4,zero=2",
    "fsdp=2,pp=2,microbatches=4,schedule=interleaved",
    "fsdp=2,pp=2,microbatches=4,schedule=zero-bubble",
]


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    return Profiles(gpt(8, 128, 4, 4, vocabulary=512, sequence=64, batch_size=16))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return find_cluster("h100x16")


def walked(program: StepProgram, stage: Stage, turn: EqualPasses) -> list[int]:
    """Return the bytes of the gathered blocks at each segment of a backward pass, in its order."""
    assert turn.sync is not None
    gathered = {block.first: block.gathered.gather for block in stage.blocks if block.gathered}
    sizes = {first: round(program.profile.gathered * size) for first, size in gathered.items()}
    there = 0 if turn.sync.blocks else sum(sizes.values())
    found = []
    kind = turn.action.kind
    for piece, gathers in issued(program.pieces(stage, kind, turn.sync, final=turn.final), kind):
        there += sum(each.bytes for each in gathers)
        found += [there] * (piece.end - piece.first)
        if turn.sync.reduces and piece.end > piece.first:
            there -= sizes.get(piece.first, 0)
    if turn.sync.blocks and stage.blocks[-1].end < stage.end:
        found[0] = 0  # the loss of a module: no gradient has reached the module's output yet
    return found


def held(costs: Costs, stage: Stage, turn: EqualPasses) -> list[int]:
    """Return what `walked` does, as the memory of the closed form has it."""
    assert turn.sync is not None
    root = 0 if stage.root is None else stage.root.gather
    each = held_at_segments(costs.profile, costs.strategy, stage, turn.sync, 0, later=not turn.first)
    return [round(costs.profile.gathered * (segment.gathered - root)) for segment in each]


def compared(costs: Costs) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (walked, held) of every backward pass of every worker."""
    for worker in costs.parts.workers:
        stages = {stage.number: stage for stage in worker.stages}
        for turn in turns(costs.strategy, worker.pipeline_rank):
            if turn.action.kind in (BACKWARD, INPUT):
                stage = stages[turn.action.stage]
                yield walked(costs.stages.program, stage, turn), held(costs, stage, turn)


@pytest.mark.parametrize("text", STRATEGIES)
def test_memory_holds_what_the_program_gathers(profiles: Profiles, cluster: Cluster, text: str) -> None:
    strategy = Strategy.parse(text)
    for program, memory in compared(costs_of(profiles.of(strategy), strategy, cluster)):
        assert any(program)
        assert memory == program


def test_memory_that_gathers_otherwise_is_noticed(profiles: Profiles, cluster: Cluster) -> None:
    def without_the_next(stage: Stage, sync: Sync, segment: int) -> range:
        right = gathered_blocks(stage, sync, segment)
        return range(min(right.start + 1, right.stop), right.stop)

    strategy = Strategy.parse("fsdp=2,pp=2,microbatches=8")
    costs = costs_of(profiles.of(strategy), strategy, cluster)
    with mock.patch.object(fsdp_memory, "gathered_blocks", without_the_next):
        assert all(memory != program for program, memory in compared(costs))
