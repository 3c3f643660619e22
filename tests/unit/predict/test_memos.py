"""No memo of the predictor forgets an option: warm predictions of every field of `Strategy` equal cold ones.

A memo whose key lacks an option gives the second of two strategies that differ in it the numbers of the first. So every
strategy is predicted by profiles that have predicted all the others before, in one order and in the other, and by
profiles that have predicted none.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.errors import StrategyError
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload

SPEC = "gpt:layers=4,hidden=512,heads=4,vocabulary=4096,sequence=32,batch_size=8"
BASES = (
    "dp=4",
    "fsdp=4",
    "tp=4",
    "pp=4",
    "dp=2,pp=2",
    "pp=4,recompute=full",
    "dp=2,fsdp=2",
    "dp=2,fsdp=2,local=4",
    "dp=4,local=4,outer=nesterov",
    "fsdp=2,tp=2",
    "pp=2,schedule=interleaved",
    "dp=4,ps=2",
    "dp=2,fsdp=2,compress=sign",
)
WORKERS = 4
OTHERS: dict[str, tuple[str | int, ...]] = {
    "dp": (2, 4),
    "fsdp": (2, 4),
    "zero": (1, 2),
    "tp": (2, 4),
    "sp": (1,),
    "pp": (2, 4),
    "microbatches": (2, 4),
    "schedule": ("gpipe", "interleaved", "zero-bubble"),
    "stages": (2, 3),
    "recompute": ("full", "selective", "1/2"),
    "bucket": (1, 5),
    "offload": (1,),
    "precision": ("bf16", "float32"),
    "reduce": ("bf16",),
    "shares": ("3:1", "1:1:3:3"),
    "speeds": ("3:1", "1:1:1:2"),
    "outermost": ("pp",),
    "compile": (1,),
    "loss_pieces": (2, 4),
    "states": (8,),
    "compress": ("int8", "powersgd:4", "topk:0.1"),
    "plain_steps": (2,),
    "local": (1, 4),
    "outer": ("nesterov",),
    "fragments": (2,),
    "delay": (1,),
    "ps": (1, 2),
    "staleness": ("2", "unbounded"),
}


def neighbours(base: Strategy) -> Iterable[Strategy]:
    """Yield the strategies that differ from `base` in one field, as far as they can be."""
    for field, values in OTHERS.items():
        for value in values:
            try:
                yield base.with_(**{field: value})
            except StrategyError:
                continue


def known(workload: Workload) -> list[Strategy]:
    """Return every base with all its neighbours, each once, that can be for this batch and four workers."""
    found: dict[Strategy, None] = {}
    for base in map(Strategy.parse, BASES):
        for strategy in (base, *neighbours(base)):
            try:
                strategy.for_batch(workload.batch_size)
            except StrategyError:
                continue
            if strategy.workers <= WORKERS:
                found[strategy] = None
    return list(found)


@dataclass
class Cold(Profiles):
    """Profiles that are traced once, but of which each is handed out as if nothing had been predicted from it."""

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return a copy that shares no object, and so no memo, with any other."""
        return copy.deepcopy(replace(super().of(strategy, batch_size), memo=Memo()))


@pytest.fixture(scope="module")
def warm() -> Profiles:
    found = profiles_on(load_workload(SPEC), cluster())
    assert isinstance(found, Profiles)
    return found


@functools.cache
def cluster() -> Cluster:
    return find_cluster(f"a100x{WORKERS}")


def predicted(profiles: Profiles, strategies: Iterable[Strategy]) -> dict[Strategy, Prediction | str]:
    """Predict strategies one after the other; where one cannot be, the reason stands in its place."""
    found: dict[Strategy, Prediction | str] = {}
    for strategy in strategies:
        try:
            found[strategy] = simulate(profiles, strategy, cluster())
        except StrategyError as error:
            found[strategy] = str(error)
    return found


def test_every_field_is_tried() -> None:
    assert set(OTHERS) == {field.name for field in fields(Strategy)}
    strategies = known(load_workload(SPEC))
    for name in OTHERS:
        assert len({getattr(strategy, name) for strategy in strategies}) > 1, f"{name} is never another"


def test_warm_predictions_equal_cold_ones(warm: Profiles) -> None:
    strategies = known(warm.workload)
    cold = Cold(warm.workload, warm.device, warm._known, warm._models)
    expected = predicted(cold, strategies)
    assert sum(isinstance(value, Prediction) for value in expected.values()) > 60
    for order in (strategies, strategies[::-1]):
        found = predicted(warm, order)
        wrong = [str(strategy) for strategy in strategies if found[strategy] != expected[strategy]]
        assert not wrong, f"a memo forgets an option of {wrong}"


def test_a_memo_that_forgets_an_option_is_noticed(warm: Profiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell that the comparison can fail: with one memo for strategies that differ in `zero` it does."""
    real = simulate
    forgetful: dict[Strategy, Prediction] = {}

    def remembered(profiles: Profiles, strategy: Strategy, on: Cluster) -> Prediction:
        key = strategy.with_(zero=3)
        if key not in forgetful:
            forgetful[key] = real(profiles, strategy, on)
        return forgetful[key]

    monkeypatch.setitem(globals(), "simulate", remembered)
    two = [Strategy.parse("fsdp=4"), Strategy.parse("fsdp=4,zero=1")]
    found = predicted(warm, two)
    assert found[two[0]] == found[two[1]]
    monkeypatch.undo()
    assert found != predicted(warm, two)
