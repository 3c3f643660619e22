"""Spelling of parameter servers in a strategy, and what they exclude."""

from __future__ import annotations

import pytest

from shardwise.errors import StrategyError
from shardwise.options import Staleness
from shardwise.strategy import Strategy


@pytest.mark.parametrize("text", ["dp=2,ps=1", "dp=4,ps=2,staleness=3", "dp=2,shares=2:1,ps=1,staleness=unbounded"])
def test_they_are_spelled_as_they_are_read(text: str) -> None:
    assert str(Strategy.parse(text)) == text


def test_staleness_is_asynchronous() -> None:
    assert Strategy.parse("dp=2,ps=1").changes == ()
    assert Strategy.parse("dp=2,ps=1,staleness=0") == Strategy.parse("dp=2,ps=1")
    assert Strategy(dp=2, ps=1, staleness=2).staleness == Staleness(2)  # type: ignore[arg-type]
    assert Strategy.parse("dp=2,ps=1,staleness=unbounded").staleness.steps is None
    for text in ("dp=2,ps=1,staleness=1", "dp=2,ps=1,staleness=unbounded"):
        assert Strategy.parse(text).changes == ("async",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ps=1", "ps=1 needs dp=2 or more"),
        ("dp=2,ps=-1", "ps=-1: must be 1 or more, or 0"),
        ("dp=2,staleness=1", "staleness=1 needs ps=1 or more"),
        ("dp=2,ps=1,staleness=-1", "staleness=-1: must be a whole number of steps"),
        ("dp=2,ps=1,staleness=unbound", "did you mean 'unbounded'"),
        ("dp=2,fsdp=2,ps=1", "ps=1 excludes fsdp=2"),
        ("dp=2,tp=2,ps=1", "ps=1 excludes tp=2"),
        ("dp=2,pp=2,ps=1", "ps=1 excludes pp=2"),
        ("dp=2,fsdp=2,zero=1,ps=1", "ps=1 excludes fsdp=2"),
        ("dp=2,bucket=5,ps=1", "ps=1 excludes bucket=5"),
        ("dp=2,compile=1,ps=2", "ps=2 excludes compile=1"),
        ("dp=2,states=8,ps=1", "ps=1 excludes states=8"),
        ("dp=2,compress=int8,ps=1", "ps=1 excludes compress=int8"),
        ("dp=2,local=4,ps=1", "ps=1 excludes local=4"),
    ],
)
def test_what_excludes_each_other_is_one_line(text: str, told: str) -> None:
    with pytest.raises(StrategyError, match=told):
        Strategy.parse(text)
