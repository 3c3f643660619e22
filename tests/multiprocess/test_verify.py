"""Verification passes where the run is right and fails where it is made wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pools
from torch import Tensor, nn
from traces import remembered

from shardwise import Strategy, Workload
from shardwise.run.verification import verify
from shardwise.workload.source import Source

Break = Callable[[], None]


class Everything(nn.Module):
    """Convolutions with batch norm, a skip connection, channel dropout, attention, tied and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(16, 8, 1)
        self.drop = nn.Dropout(0.2)
        self.attention = nn.MultiheadAttention(8, 4, dropout=0.1, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad = False
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.norm(self.down(x)))
        deep = F.relu(self.inner(F.max_pool2d(skip, 2)))
        wide = self.up(torch.cat([skip, F.interpolate(deep, scale_factor=2.0)], 1))
        tokens = self.drop(wide.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        output: Tensor = self.head(self.second(F.gelu(self.first(tokens))).mean(1))
        return output


def everything() -> Workload:
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(2, 4, 4, generator=generator), n % 6) for n in range(20)]
    return Workload(
        name="everything",
        model=Everything,
        dataset=data,
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        batch_size=8,
        clip_norm=0.5,
    )


def trial(folder: Path, strategy: str, *, float64: bool = True) -> verify.StrategyTrial:
    settled = Strategy.parse(strategy).for_batch(8)
    return verify.StrategyTrial(
        source=Source(workload=everything()), strategy=settled, steps=3, float64=float64, folder=str(folder)
    )


@pytest.fixture(scope="module")
def recorded(workers: Pools, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """One worker's steps, recorded once for each number of microbatches."""
    folders: dict[Any, Path] = {}

    def get(strategy: str, *, float64: bool = True) -> Path:
        count = Strategy.parse(strategy).for_batch(8).microbatches
        if (count, float64) not in folders:
            folders[count, float64] = tmp_path_factory.mktemp("alone")
            workers(1, verify.record, trial(folders[count, float64], f"microbatches={count}", float64=float64))
        return folders[count, float64]

    return get


def proof(workers: Pools, folder: Path, strategy: str, *, float64: bool = True, sabotage: Break | None = None) -> Any:
    count = Strategy.parse(strategy).workers
    return workers(count, compare, trial(folder, strategy, float64=float64), sabotage)[0]


def compare(work: verify.StrategyTrial, sabotage: Break | None) -> Any:
    with remembered((work.source, work.float64)), pytest.MonkeyPatch.context() as patch:
        if sabotage is not None:
            sabotage(patch)  # type: ignore[call-arg]
        return verify.compare(work)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "tp=2,sp=1", "pp=2", "dp=2,tp=2", "tp=2,pp=2"])
def test_what_is_right_passes(strategy: str, workers: Pools, recorded: Callable[..., Path]) -> None:
    found = proof(workers, recorded(strategy), strategy)
    assert found.passed, found
    assert max(found.loss.error, found.gradient.error, found.parameter.error) < 1e-10
    assert found.tolerance < 1e-10
    if "tp=2" in strategy:
        assert found.sharded_share > 0.9


def forget_momentum(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.data import local_steps

    patch.setattr(local_steps, "MOMENTUM", 0.0)


def average_unequally(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.data.local_steps import LocalSteps

    right = LocalSteps._factor
    patch.setattr(LocalSteps, "_factor", lambda self, own, everybody: right(self, own, everybody) * 0.9)


@pytest.mark.parametrize(
    ("strategy", "sabotage"),
    [
        ("dp=2,local=2,outer=nesterov", forget_momentum),
        ("dp=2,fsdp=2,local=2,fragments=2", None),
        ("dp=2,tp=2,local=2,outer=nesterov", None),
        ("dp=2,pp=2,local=2,delay=1", average_unequally),
    ],
)
def test_local_steps_are_compared_with_replicas_that_one_process_plays(
    strategy: str, sabotage: Break | None, workers: Pools, tmp_path: Path
) -> None:
    workers(1, verify.record, trial(tmp_path, strategy))
    found = proof(workers, tmp_path, strategy)
    assert found.passed, found
    assert max(found.loss.error, found.gradient.error, found.parameter.error) < 1e-10
    assert any("one process that plays the 2 replicas" in note for note in found.notes)
    if sabotage is not None:
        assert not proof(workers, tmp_path, strategy, sabotage=sabotage).passed


def test_few_steps_shorten_what_is_between_averages() -> None:
    def shortened(text: str, steps: int) -> str:
        return str(verify._shortened(Strategy.parse(text), steps))

    assert shortened("dp=2,local=500", 3) == "dp=2,local=3"
    assert shortened("dp=2,local=500,fragments=5,delay=7", 3) == "dp=2,local=5,fragments=5,delay=4"
    assert shortened("dp=2,local=2,delay=1", 3) == "dp=2,local=2,delay=1"
    assert shortened("dp=2", 3) == "dp=2"


def test_float32_has_a_wider_tolerance(workers: Pools, recorded: Callable[..., Path]) -> None:
    found = proof(workers, recorded("tp=2", float64=False), "tp=2", float64=False)
    assert found.passed, found
    assert 1e-6 < found.tolerance < 1e-2


def skip_a_sum(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.tensor.communication import Exchange

    patch.setattr(Exchange, "reduce", lambda self, x: x)


def skip_a_gradient_sum(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.tensor.communication import Exchange

    patch.setattr(Exchange, "enter", lambda self, x: x)
    patch.setattr(Exchange, "enter_unawaited", lambda self, x, fresh: x)


def scale_by_the_wrong_degree(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.program import Program

    right = Program._scales
    patch.setattr(Program, "_scales", lambda self, share: [scale * 2 for scale in right(self, share)])


def leave_batch_norm_alone(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.operators import graph_operators

    right = graph_operators.GraphOperators.__init__
    patch.setattr(
        graph_operators.GraphOperators,
        "__init__",
        lambda self, position, exchange, replicas, **options: right(self, position, exchange, None, **options),
    )


def drop_differently_on_shards(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.operators import graph_operators

    right = graph_operators.GraphOperators.mask
    patch.setattr(
        graph_operators.GraphOperators,
        "mask",
        lambda self, site, *rest: right(self, site + 1000 * self.exchange.rank, *rest),
    )


def lose_the_last_microbatch(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.graph.graph_engine import GraphEngine

    right = GraphEngine._pass

    def shortened(self: Any, share: Any, scales: Any) -> Any:
        from dataclasses import replace

        return right(self, replace(share, microbatches=share.microbatches[:-1]), scales)

    patch.setattr(GraphEngine, "_pass", shortened)


def cut_evenly(patch: pytest.MonkeyPatch) -> None:
    """Cuts that do not depend on what was measured."""
    from shardwise.parallel.pipeline import divide

    patch.setattr(divide, "_timed", lambda step, tensors, data, used, repeats=3: [1.0] * len(used))


def lose_a_skip_connection(patch: pytest.MonkeyPatch) -> None:
    """The gradient that comes back from the later stage, for the value that skips."""
    from shardwise.parallel.pipeline import executor

    cut_evenly(patch)

    right = executor._gradient
    patch.setattr(executor, "_gradient", lambda value: right(value) * (value.dim() != 4 or value.shape[1] != 8))


def leave_tied_weights_apart(patch: pytest.MonkeyPatch) -> None:
    from shardwise.parallel.graph.parameters import LocalStages

    cut_evenly(patch)
    patch.setattr(LocalStages, "_sum", lambda self, names, group: None)


@pytest.mark.parametrize(
    ("strategy", "sabotage"),
    [
        ("tp=2", skip_a_sum),
        ("tp=2", skip_a_gradient_sum),
        ("dp=2", scale_by_the_wrong_degree),
        ("tp=2", scale_by_the_wrong_degree),
        ("dp=2,tp=2", leave_batch_norm_alone),
        ("tp=2", drop_differently_on_shards),
        ("pp=2", lose_the_last_microbatch),
        ("pp=4", lose_a_skip_connection),
        ("pp=4", leave_tied_weights_apart),
    ],
)
def test_what_is_made_wrong_fails(
    strategy: str, sabotage: Break, workers: Pools, recorded: Callable[..., Path]
) -> None:
    found = proof(workers, recorded(strategy), strategy, sabotage=sabotage)
    assert not found.passed, f"{sabotage.__name__} was not noticed: {found}"


def test_data_that_changes_is_refused(workers: Pools, tmp_path: Path) -> None:
    class Fresh(list):  # type: ignore[type-arg]
        reads = 0

        def __getitem__(self, index: int) -> Any:  # type: ignore[override]
            self.reads += 1
            return torch.full((2, 4, 4), float(self.reads)), 0

    from dataclasses import replace

    work = replace(trial(tmp_path, "single"), source=Source(workload=replace(everything(), dataset=Fresh([0] * 8))))
    with pytest.raises(Exception, match="gives other samples each time it is read"):
        workers(1, verify.record, work)
