"""The value at the centre: its spelling, what it refuses, and what it settles."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from shardwise.errors import StrategyError
from shardwise.options import Ratio, Recompute
from shardwise.strategy import Strategy

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize(
    "text",
    [
        "single",
        "dp=2",
        "dp=2,fsdp=4,zero=2,tp=2,sp=1,pp=2,microbatches=8,schedule=interleaved,stages=3,recompute=full,precision=bf16",
        "single,microbatches=4,recompute=3/16",
        "dp=3,shares=3:1:1",
        "dp=2,pp=2,outermost=pp",
        "pp=3,speeds=1:2:4",
        "fsdp=2,zero=1,bucket=5",
        "dp=2,precision=bf16,reduce=bf16",
        "dp=2,fsdp=2,zero=2,offload=1",
        "single,loss_pieces=8",
        "dp=2,states=8",
        "dp=2,compress=powersgd:4,plain_steps=100",
        "fsdp=2,compress=topk:0.005",
        "dp=2,fsdp=2,compress=sign",
        "dp=2,fsdp=2,local=12,outer=nesterov,fragments=4,delay=3",
    ],
)
def test_its_spelling_is_read_back(text: str) -> None:
    assert str(Strategy.parse(text)) == text
    assert Strategy.parse(str(Strategy.parse(text))) == Strategy.parse(text)


@pytest.mark.parametrize(
    ("text", "row", "expected", "samples"),
    [
        ("dp=2,local=4", 1, "single", 8),
        ("dp=2,fsdp=2,pp=2,outermost=pp,local=4,outer=nesterov", 0, "fsdp=2,pp=2,outermost=pp", 8),
        ("dp=2,pp=2,outermost=pp,local=4,delay=1", 0, "pp=2", 8),
        ("dp=2,shares=3:1,local=2", 0, "single", 12),
        ("dp=2,fsdp=2,shares=1:2:3:2,local=2", 1, "fsdp=2,shares=3:2", 10),
    ],
)
def test_a_replica_of_local_steps_is_a_strategy_of_its_own(text: str, row: int, expected: str, samples: int) -> None:
    strategy = Strategy.parse(text)
    assert str(strategy.of_replica(row)) == expected
    assert strategy.batch_of(row, 16) == samples
    assert strategy.changes == ("lossy",)
    assert strategy.summing == strategy.fsdp


def test_parts_of_blocks_are_in_lowest_terms() -> None:
    assert Strategy.parse("dp=2,recompute=4/8") == Strategy(dp=2, recompute=Recompute(1, 2))


@pytest.mark.parametrize(
    ("recompute", "blocks", "again"),
    [
        ("none", 7, 0),
        ("full", 7, 7),
        ("1/2", 7, 4),
        ("1/2", 8, 4),
        ("1/16", 3, 1),
        ("15/16", 1, 1),
        ("1/2", 0, 0),
        ("selective", 7, 7),
    ],
)
def test_so_many_blocks_are_computed_again(recompute: str, blocks: int, again: int) -> None:
    assert Strategy.parse(f"recompute={recompute}").recomputed_of(blocks) == again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; for example"),
        ("ddp=2", "unknown axis 'ddp' in strategy 'ddp=2': known are .* did you mean 'dp'"),
        ("dp=two", "dp=two: must be a whole number"),
        ("dp", "'dp' in strategy 'dp' has no value"),
        ("dp=2,dp=2", "dp is given twice"),
        ("dp=0", "dp=0: a degree is 1 or more"),
        ("single,dp=2", "single is one worker, the degrees make 2"),
        ("fsdp=2,zero=4", "zero=4: must be 1, 2 or 3"),
        ("zero=1", "zero=1 needs fsdp=2 or more"),
        ("sp=1", "sp=1 needs tp=2 or more"),
        ("tp=2,sp=2", "sp=2: must be 0 or 1"),
        ("schedule=gpipe", "schedule=gpipe needs pp=2 or more"),
        ("pp=2,schedule=gipe", "known are gpipe, 1f1b, interleaved, zero-bubble, pipedream; did you mean 'gpipe'"),
        ("pp=2,stages=2", "stages=2 needs schedule=interleaved, not 1f1b"),
        ("stages=2", "stages=2 needs pp=2 or more"),
        ("dp=2,bucket=-1", "bucket=-1: must be 1 MiB or more"),
        ("bucket=5", "bucket=5 needs replicas that add up whole gradients"),
        (
            "dp=2,fsdp=2,bucket=5",
            "bucket=5 needs replicas that add up whole gradients: dp=2 or more, or fsdp with zero=1",
        ),
        ("dp=2,offload=1", "offload=1 needs fsdp=2 or more with zero=2 or 3"),
        ("fsdp=2,zero=1,offload=1", "offload=1 needs fsdp=2 or more with zero=2 or 3"),
        ("fsdp=2,offload=2", "offload=2: must be 0 or 1"),
        ("loss_pieces=1", "loss_pieces=1: must be 2 or more; 0 computes the loss whole"),
        ("states=4", "states=4: must be 8, or 0 for states as the optimizer has them"),
        ("loss_pieces=-2", "loss_pieces=-2: must be 2 or more"),
        ("microbatches=-1", "microbatches=-1: must be 1 or more"),
        (
            "recompute=ful",
            "known are none, selective, full and parts of the blocks, 1/2 or 3/4 say; did you mean 'full'",
        ),
        ("recompute=2/2", "recompute=2/2: known are none, selective, full and parts"),
        ("recompute=0/2", "recompute=0/2: known are none, selective, full and parts"),
        ("recompute=1/0", "recompute=1/0: known are none, selective, full and parts"),
        ("recompute=-1/2", "recompute=-1/2: known are none, selective, full and parts"),
        ("precision=fp16", "precision=fp16: known are float32, bf16"),
        ("pp=2,speeds=1", "speeds=1: one whole number of 1 or more for each of the 2 pipeline workers, .* speeds=2:1"),
        ("pp=2,outermost=pp", "outermost=pp needs pp=2 or more, and dp=2 or fsdp=2 or more beside it"),
        ("dp=2,outermost=pp", "outermost=pp needs pp=2 or more"),
        ("dp=2,pp=2,outermost=tp", "outermost=tp: known are dp, pp"),
        ("local=4", "local=4 needs dp=2 or more: replicas along dp take local steps"),
        ("fsdp=2,local=4", "local=4 needs dp=2 or more"),
        ("dp=2,local=-1", "local=-1: must be 1 or more"),
        ("dp=2,fragments=0", "fragments=0: must be 1 or more"),
        ("dp=2,outer=nesterov", "outer=nesterov needs local=1 or more"),
        ("dp=2,fragments=2", "fragments=2 needs local=1 or more"),
        ("dp=2,delay=1", "delay=1 needs local=1 or more"),
        ("dp=2,local=4,outer=adam", "outer=adam: known are average, nesterov"),
        ("dp=2,local=4,fragments=3", "fragments=3 must divide local=4: use fragments=1 or 2 or 4"),
        ("dp=2,local=4,delay=4", "delay=4 needs local=5 or more"),
        ("dp=2,local=4,bucket=5", "add up whole gradients: .*; those that take local steps add up none"),
        ("dp=2,local=4,precision=bf16,reduce=bf16", "reduce=bf16 needs .*; those that take local steps sum none"),
        ("dp=2,shares=1", "one whole number of 1 or more for each of the 2 replicas"),
        ("dp=2,shares=1:0", "shares=1:0: one whole number of 1 or more"),
        ("dp=2,shares=3", "shares=3: one whole number of 1 or more for each of the 2 replicas"),
        ("dp=2,shares=3:0", "shares=3:0: one whole number"),
        ("dp=2,shares=a:b", "shares=a:b: one whole number"),
        ("schedule=pipedream", "schedule=pipedream needs pp=2 or more"),
        ("dp=2,pp=2,schedule=pipedream", "schedule=pipedream excludes dp=2, fsdp=1"),
        ("fsdp=2,pp=2,schedule=pipedream", "schedule=pipedream excludes dp=1, fsdp=2"),
        ("pp=2,schedule=pipedream,stages=2", "stages=2 needs schedule=interleaved"),
        ("pp=2,schedule=pipedream,compress=int8", "compress=int8 needs dp=2"),
        ("pp=2,schedule=pipedream,local=2", "local=2 needs dp=2"),
        ("pp=2,schedule=pipedream,ps=1", "ps=1 needs dp=2"),
        ("tp=2,compress=int8", "compress=int8 needs dp=2 or fsdp=2 or more"),
        ("compress=int8", "compress=int8 needs dp=2 or fsdp=2 or more"),
        ("dp=2,reduce=bf16,compress=int8", "compress=int8 excludes reduce=bf16"),
        ("fsdp=2,offload=1,compress=sign", "compress=sign excludes offload=1"),
        ("dp=2,compress=int4", "compress=int4: known are powersgd:4 .*int8, sign, fp8, bf16; did you mean"),
        ("dp=2,compress=powersgd", "powersgd needs a rank: compress=powersgd:4"),
        ("dp=2,compress=int8:2", "int8 has no number"),
        ("dp=2,compress=powersgd:0", "the rank of powersgd is a whole number of 1 or more"),
        ("dp=2,compress=topk:1.5", "a share is above 0 and below 1"),
        ("dp=2,compress=topk:0", "a share is above 0 and below 1"),
        ("dp=2,compress=topk:0.00000001", "a share is above 0 and below 1"),
        ("dp=2,plain_steps=2", "plain_steps=2 needs compress="),
        ("dp=2,compress=int8,plain_steps=-1", "plain_steps=-1"),
    ],
)
def test_what_is_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Strategy.parse(text)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("dp=2,fsdp=3,tp=7,pp=5", ("dp", "fsdp", "pp", "tp")),
        ("dp=2,fsdp=3,tp=7,pp=5,outermost=pp", ("pp", "dp", "fsdp", "tp")),
    ],
)
def test_ranks_are_numbered_with_the_last_axis_fastest(text: str, order: tuple[str, ...]) -> None:
    strategy = Strategy.parse(text)
    sizes = [getattr(strategy, axis) for axis in order]
    places = itertools.product(*map(range, sizes))
    assert [strategy.rank(**dict(zip(order, place, strict=True))) for place in places] == list(range(210))


@pytest.mark.parametrize(
    ("text", "batch", "microbatches"),
    [("dp=2", 8, 1), ("pp=2", 16, 4), ("pp=2", 6, 3), ("dp=2,pp=2,schedule=interleaved", 32, 8), ("pp=4", 1, 1)],
)
def test_microbatches_are_settled(text: str, batch: int, microbatches: int) -> None:
    assert Strategy.parse(text).for_batch(batch).microbatches == microbatches


@pytest.mark.parametrize(
    ("text", "batch", "message"),
    [
        ("dp=3", 8, "batch_size=8 does not divide by the 3 replicas of dp=3: use batch_size=6 or 9"),
        ("dp=2,microbatches=3", 8, "does not divide into 3 microbatches on 2 replicas: .* or microbatches=1 or 2 or 4"),
        ("dp=2,shares=3:1", 6, "does not divide by the 4 parts"),
        ("dp=2,shares=2:1", 8, "batch_size=8 does not divide by the 3 parts of dp=2,shares=2:1: use "),
        ("pp=2,schedule=interleaved,microbatches=3", 6, "needs microbatches that divide by pp=2, not 3"),
        ("pp=4,schedule=pipedream,microbatches=2", 8, "needs as many microbatches as stages, 4 or more, not 2"),
        ("pp=4,schedule=pipedream", 3, "needs microbatches=4 or more, as many as stages, not 3: use batch_size=4"),
    ],
)
def test_batches_that_do_not_divide_are_refused(text: str, batch: int, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Strategy.parse(text).for_batch(batch)


def test_shares_have_samples_in_their_ratio() -> None:
    strategy = Strategy.parse("dp=2,shares=6:2").for_batch(8)
    assert strategy.parts == (3, 1)
    assert [strategy.samples_of(replica, 8) for replica in range(2)] == [6, 2]


@pytest.mark.parametrize(
    ("text", "runs"),
    [("single", True), ("dp=2,fsdp=2", True), ("dp=2,tp=2", False), ("pp=2", False), ("loss_pieces=2", False)],
)
def test_only_replicas_run_the_module_as_it_is(text: str, runs: bool) -> None:
    assert Strategy.parse(text).runs_module is runs


def test_nobody_else_decides_who_runs_the_module() -> None:
    asked = re.compile(r"tp == [\w.]*pp == 1|tp > 1 or [\w.]*pp > 1")
    found = {path.name for path in SOURCE.rglob("*.py") if asked.search(path.read_text())}
    assert found == {"strategy.py"}


def test_options_are_values_however_they_are_given() -> None:
    parsed = Strategy.parse("dp=2,shares=3:1,recompute=2/6")
    spelled = Strategy(dp=2).with_(shares="3:1", recompute="2/6")
    assert parsed == spelled == Strategy(dp=2, shares=Ratio((3, 1)), recompute=Recompute(1, 3))
    assert len({parsed, spelled}) == 1
    assert str(spelled) == "dp=2,recompute=1/3,shares=3:1"


@pytest.mark.parametrize("option", ["shares", "speeds", "recompute"])
def test_an_option_that_is_neither_a_value_nor_its_spelling_is_refused(option: str) -> None:
    with pytest.raises(StrategyError, match=f"{option}=3: must be a text"):
        Strategy(dp=2, pp=2).with_(**{option: 3})
