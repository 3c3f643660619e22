"""Software refuses what it cannot run, and says what would do."""

from __future__ import annotations

from dataclasses import fields

import pytest

from shardwise.errors import RequestError
from shardwise.predict.runtime.sizes import Sizes
from shardwise.predict.runtime.software import ABILITIES, RUNTIMES, Software, abilities_of
from shardwise.strategy import Strategy

SIZES = Sizes(layers=12, hidden=512, heads=16, kv_heads=4, ffn=2048, vocab=1000, sequence=128, gated=True, tied=False)


def software(name: str) -> Software:
    return Software(ABILITIES[name], SIZES if ABILITIES[name].models else None)


@pytest.mark.parametrize(
    ("name", "strategy", "told"),
    [
        ("megatron", "fsdp=8", "has zero=1, not zero=3"),
        ("megatron", "dp=2,fsdp=4,zero=1", "use fsdp=8 alone"),
        ("megatron", "tp=8", "does not divide the 4 heads of keys and values"),
        ("megatron", "tp=3", "does not divide the 16 attention heads"),
        ("megatron", "pp=8", "12 do not divide by 8, nor do 14"),
        ("megatron", "pp=4,schedule=interleaved", "12 do not divide by 8, nor do 14"),
        ("megatron", "pp=2,schedule=gpipe", "schedule=1f1b or schedule=interleaved, not schedule=gpipe"),
        ("megatron", "dp=8,recompute=selective", "and parts of the blocks, not recompute=selective"),
        ("megatron", "dp=8,bucket=5", "bucket=0, not bucket=5"),
        ("torchtitan", "tp=2", "add sp=1"),
        ("torchtitan", "dp=2,tp=2,sp=1", "use fsdp=2 in place of dp=2"),
        ("torchtitan", "fsdp=8,zero=1", "zero=2 or zero=3, not zero=1"),
        ("torchtitan", "fsdp=2,pp=2", "add outermost=pp"),
        ("torchtitan", "pp=2,schedule=zero-bubble", "not schedule=zero-bubble"),
        ("torchtitan", "fsdp=8,recompute=1/2", "recompute=none or recompute=full, not recompute=1/2"),
        ("torchtitan", "pp=16", "12 blocks are too few for 16 stages"),
        ("deepspeed", "dp=8", "use fsdp=8 with zero=1 or zero=2 or zero=3 in place of dp=8"),
        ("deepspeed", "dp=2,fsdp=4", "use fsdp=8 alone"),
        ("deepspeed", "tp=2", "DeepSpeed has tp=1, not tp=2"),
        ("deepspeed", "pp=2", "DeepSpeed has pp=1, not pp=2"),
        ("accelerate", "tp=2", "accelerate has tp=1, not tp=2"),
        ("accelerate", "fsdp=8,zero=1", "accelerate has zero=2 or zero=3, not zero=1"),
        ("accelerate", "dp=2,shares=3:1", "shares=equal, not shares=3:1"),
    ],
)
def test_refusals(name: str, strategy: str, told: str) -> None:
    refusal = software(name).refusal(Strategy.parse(strategy))
    assert refusal is not None
    assert told in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("megatron", "single"),
        ("megatron", "dp=8"),
        ("megatron", "fsdp=2,zero=1,tp=4,sp=1,pp=3,outermost=pp,recompute=1/4"),
        ("megatron", "tp=2,pp=2,schedule=interleaved,stages=3"),
        ("megatron", "pp=7"),
        ("torchtitan", "dp=8"),
        ("torchtitan", "dp=2,fsdp=2,zero=2,tp=2,sp=1,pp=2,outermost=pp,schedule=gpipe"),
        ("torchtitan", "fsdp=8,offload=1"),
        ("deepspeed", "single"),
        ("deepspeed", "fsdp=8,zero=1"),
        ("deepspeed", "fsdp=8,zero=2,offload=1,recompute=full"),
        ("accelerate", "dp=8"),
        ("accelerate", "dp=2,fsdp=4,zero=2"),
    ],
)
def test_possible_strategies(name: str, strategy: str) -> None:
    assert software(name).refusal(Strategy.parse(strategy)) is None


@pytest.mark.parametrize("name", ABILITIES)
def test_the_table_names_options_that_strategies_have(name: str) -> None:
    able = ABILITIES[name]
    assert set(able.values) <= {field.name for field in fields(Strategy)}
    assert able.source
    for option, values in able.values.items():
        assert str(getattr(Strategy(), option)) in values, f"{option} must have its default"
        for value in values:
            assert software(name).allows(option, value)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert RUNTIMES == ("shardwise", "megatron", "torchtitan", "deepspeed", "accelerate")
    assert abilities_of("shardwise") is None
    with pytest.raises(RequestError, match=r"runtime=megatorn: known are .*; did you mean 'megatron'\?"):
        abilities_of("megatorn")
