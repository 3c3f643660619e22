"""Work of a rank in a step is known for any number of microbatches without writing its table down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from shardwise.predict.workers.pass_arrays import KINDS, sequence
from shardwise.predict.workers.passes import Counts, Left, Moment, Sync, actions_of, moments, turns
from shardwise.predict.workers.passes import table as passes
from shardwise.splitting.schedule import BACKWARD, FORWARD, WEIGHT, Action
from shardwise.strategy import Strategy

SEVERAL_STAGES = [
    "fsdp=2,pp=4,schedule=interleaved",
    "fsdp=2,pp=2,zero=2,schedule=interleaved",
    "fsdp=2,pp=2,stages=3,schedule=interleaved",
]
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
    *SEVERAL_STAGES,
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
        reduces = action.kind != FORWARD and (strategy.reduces_at_once or last[stage] == index)
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


def walked(strategy: Strategy, pipeline_rank: int) -> Iterator[Moment]:
    """Yield what is in flight, and what `fully_shard` holds, around every pass of a worker with several stages."""
    stages = range(pipeline_rank, strategy.pp * strategy.stages_per_worker, strategy.pp)
    actions = actions_of(strategy, pipeline_rank)
    flight = dict.fromkeys(stages, 0)
    left = dict.fromkeys(stages, Left(False, False, False, False))
    for action, sync in zip(actions, syncs(strategy, actions), strict=True):
        stage, forward = action.stage, action.kind == FORWARD
        flight[stage] += forward
        counts: Counts = tuple((each, count, 0) for each, count in flight.items() if count or each in begun(left))
        others = tuple((each, found) for each, found in left.items() if each != stage)
        single = strategy.microbatches == 1
        yield Moment((stage,), counts, left[stage].gradients, Sync(sync.blocks, sync.root, single), others, forward)
        flight[stage] -= not forward
        freed = sync.reduces or (forward and strategy.zero == 3)
        gradients = left[stage].gradients or not forward
        left[stage] = Left(not freed, not sync.reduces, gradients, gradients and not sync.reduces)


def begun(left: dict[int, Left]) -> list[int]:
    return [stage for stage, found in left.items() if found != Left(False, False, False, False)]


def held(moment: Moment) -> int:
    """Return the number of stages that are gathered, and that have unsharded gradients, in a moment."""
    assert moment.sync is not None
    own = (moment.sync.blocks == moment.forward) + moment.later
    return own + sum(left.blocks + left.unsharded for _, left in moment.others)


@pytest.mark.parametrize("count", [1, 2, 4, 12, 24, 36, 60])
@pytest.mark.parametrize("text", SEVERAL_STAGES)
def test_moments_of_several_sharded_stages_are_those_of_the_table(text: str, count: int) -> None:
    strategy = Strategy.parse(text).with_(microbatches=count)
    for pipeline_rank in range(strategy.pp):
        every = list(walked(strategy, pipeline_rank))
        found = moments(strategy, pipeline_rank)
        assert set(found) <= set(every)
        for forward in (False, True) if strategy.zero == 3 else (False,):
            for stage in {each.stages for each in every}:
                table, mine = (
                    [(each.saved, held(each)) for each in some if each.stages == stage and each.forward == forward]
                    for some in (every, found)
                )
                assert max(table) in mine
                assert max(table, key=lambda pair: pair[::-1]) in mine


def test_a_stage_is_held_while_another_one_runs() -> None:
    """Under zero=2 from its first forward pass on; under zero=3 a forward pass frees it, a backward pass does not."""
    for zero in (2, 3):
        strategy = Strategy.parse(f"fsdp=2,pp=2,zero={zero},schedule=interleaved,microbatches=4")
        last = [each for each in moments(strategy, 1) if not each.forward][-1]
        assert (last.stages, last.later) == ((3,), True)
        assert last.others == ((1, Left(blocks=True, root=True, gradients=True, unsharded=True)),)


@pytest.mark.parametrize("count", [1, 4, 12, 24, 36, 60])
@pytest.mark.parametrize("text", [text for text in STRATEGIES if text not in SEVERAL_STAGES])
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
