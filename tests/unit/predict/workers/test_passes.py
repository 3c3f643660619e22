"""Work of a rank in a step is known for any number of microbatches without writing its table down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from shardwise.predict.workers.pass_arrays import KINDS, sequence
from shardwise.predict.workers.passes import Sync, actions_of, moments, turns
from shardwise.predict.workers.passes import table as passes
from shardwise.splitting.schedule import BACKWARD, FORWARD, WEIGHT, Action
from shardwise.strategy import Strategy

STRATEGIES = [
    "dp=2",
    "fsdp=2",
    "fsdp=2,zero=2",
    "tp=2",
    "fsdp=2,tp=2",
    "pp=4",
    "pp=3,schedule=gpipe",
    "pp=4,schedule=interleaved",
    "pp=2,stages=3,schedule=interleaved",
    "pp=4,schedule=zero-bubble",
    "fsdp=2,pp=4",
    "fsdp=2,pp=4,zero=2,schedule=zero-bubble",
    "fsdp=2,pp=4,schedule=interleaved",
]


def syncs(strategy: Strategy, actions: Sequence[Action]) -> list[Sync]:
    """Return the collectives of `fully_shard` at each action of a worker, by what is gathered when it begins."""
    whole: dict[int, bool] = {}
    root: dict[int, bool] = {}
    last = {action.stage: index for index, action in enumerate(actions) if action.kind not in (FORWARD, WEIGHT)}
    found = []
    for index, action in enumerate(actions):
        stage = action.stage
        if action.kind == WEIGHT:
            found.append(Sync(False, False, False))
            continue
        reduces = action.kind != FORWARD and (strategy.runs_module or last[stage] == index)
        found.append(Sync(not whole.get(stage, False), not root.get(stage, False), reduces))
        root[stage] = not reduces
        whole[stage] = strategy.zero != 3 if action.kind == FORWARD else not reduces
    return found


@pytest.mark.parametrize("count", [1, 4, 12, 24, 36, 60])
@pytest.mark.parametrize("text", STRATEGIES)
def test_turns_count_the_table(text: str, count: int) -> None:
    strategy = Strategy.parse(text).with_(microbatches=count)
    for pipeline_rank in range(strategy.pp):
        actions = actions_of(strategy, pipeline_rank)
        shards = syncs(strategy, actions) if strategy.splits_parameters else [None] * len(actions)
        table: Counter[tuple[str, int, Sync | None]] = Counter()
        for action, sync in zip(actions, shards, strict=True):
            table[action.kind, action.stage, sync] += 1
        found: Counter[tuple[str, int, Sync | None]] = Counter()
        for turn in turns(strategy, pipeline_rank):
            found[turn.action.kind, turn.action.stage, turn.sync] += turn.count
        assert found == table
        finals = [turn for turn in turns(strategy, pipeline_rank) if turn.final]
        assert [turn.count for turn in finals] == [1] * strategy.stages_per_worker


@pytest.mark.parametrize("count", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("text", STRATEGIES)
def test_sequences_are_the_tables(text: str, count: int) -> None:
    strategy = Strategy.parse(text).with_(microbatches=count)
    for pipeline_rank in range(strategy.pp):
        kinds, chunks = sequence(strategy, pipeline_rank)
        found = [(KINDS[kind], chunk * strategy.pp + pipeline_rank) for kind, chunk in zip(kinds, chunks, strict=True)]
        assert found == [(action.kind, action.stage) for action in actions_of(strategy, pipeline_rank)]


@pytest.mark.parametrize("count", [1, 2, 4, 12])
@pytest.mark.parametrize("text", STRATEGIES)
def test_turns_are_those_of_the_table(text: str, count: int) -> None:
    strategy = Strategy.parse(text).with_(microbatches=count)
    for pipeline_rank in range(strategy.pp):
        table = Counter(turn.kind for turn in passes(strategy, pipeline_rank))
        assert {turn.kind: turn.count for turn in turns(strategy, pipeline_rank)} == table
        order = list(dict.fromkeys(turn.kind for turn in passes(strategy, pipeline_rank)))
        for stage in {turn.action.stage for turn in turns(strategy, pipeline_rank)}:
            mine = [turn.kind for turn in turns(strategy, pipeline_rank) if turn.action.stage == stage]
            assert mine == [kind for kind in order if kind[1] == stage]


@pytest.mark.parametrize("count", [1, 4, 12, 24, 36, 60])
@pytest.mark.parametrize("text", STRATEGIES)
def test_moments_are_those_of_the_table(text: str, count: int) -> None:
    strategy = Strategy.parse(text).with_(microbatches=count)
    for pipeline_rank in range(strategy.pp):
        actions = actions_of(strategy, pipeline_rank)
        in_flight, before = 0, []
        for action, sync in zip(actions, syncs(strategy, actions), strict=True):
            if action.kind not in (FORWARD, WEIGHT):
                before.append((in_flight, sync.blocks))
            in_flight += (action.kind == FORWARD) - (action.kind in (BACKWARD, WEIGHT))
        first, *others = before
        expected = [first, *([max(others, key=lambda each: each[0])] if others else [])]
        found = moments(strategy, pipeline_rank)
        assert [sum(saved + put_off for _, saved, put_off in each.counts) for each in found] == [n for n, _ in expected]
        if strategy.splits_parameters:
            assert [each.sync and each.sync.blocks for each in found] == [gathers for _, gathers in expected]


def test_known_numbers() -> None:
    """1f1b keeps as many microbatches as there are stages behind (Narayanan et al. 2021), gpipe all of them."""
    many = Strategy.parse("pp=4,microbatches=1000")
    for pipeline_rank in range(4):
        assert [each.counts for each in moments(many, pipeline_rank)] == [((pipeline_rank, 4 - pipeline_rank, 0),)] * 2
    assert [each.counts for each in moments(many.with_(schedule="gpipe"), 0)] == [((0, 1000, 0),), ((0, 999, 0),)]
    first = turns(many, 0)
    assert [(turn.action.kind, turn.first, turn.final, turn.count) for turn in first] == [
        (FORWARD, False, False, 1000),
        (BACKWARD, True, False, 1),
        (BACKWARD, False, False, 998),
        (BACKWARD, False, True, 1),
    ]
