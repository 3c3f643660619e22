"""Losses by name, losses with parameters and losses of the whole batch: each is trained as by one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from breaking import assert_noticed
from equality import check
from models import points
from pool import Pools
from safetensors.torch import load_file
from torch import Tensor, nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.data import module_engine
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.one_batch import in_one_batch
from shardwise.workload.workload import Evaluation, Workload


class Scores(nn.Module):
    """Two towers, and the score of each sample in one against all in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(6, 16)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.drop(torch.relu(self.a(x))), dim=-1), F.normalize(self.b(x.flip(1)), dim=-1)


class Classes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


class Scaled(nn.Module):
    """Cross entropy with a trained temperature and trained prior."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([1.5]))
        self.prior = nn.Parameter(torch.zeros(4))

    def forward(self, output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output * self.temperature + self.prior, batch[1])


def contrastive(output: tuple[Tensor, Tensor], batch: Any) -> Tensor:
    scores = output[0] @ output[1].T * 5
    return F.cross_entropy(scores, torch.arange(len(scores)))


def named(output: Tensor, batch: Any) -> dict[str, Tensor]:
    return {"classes": F.cross_entropy(output, batch[1]), "size": 0.1 * output.square().mean()}


def build(model: Callable[[], nn.Module], loss: Any, **changes: Any) -> Workload:
    return Workload(
        name="losses",
        model=lambda: model().double(),
        dataset=points(20),
        inputs=lambda batch: batch[0],
        loss=loss.double() if isinstance(loss, nn.Module) else loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        batch_size=8,
        clip_norm=0.5,
        **changes,
    )


def whole() -> Workload:
    return build(Scores, contrastive, whole_batch=True)


def trained() -> Workload:
    return build(Classes, Scaled())


def several() -> Workload:
    return build(Classes, named)


CASES = [
    *((whole, strategy) for strategy in ("dp=2", "fsdp=2", "dp=4", "dp=2,fsdp=2", "tp=2", "pp=2,microbatches=1")),
    *((trained, strategy) for strategy in ("dp=2", "fsdp=2", "tp=2", "pp=2", "fsdp=2,zero=1", "dp=2,tp=2")),
    *((several, strategy) for strategy in ("dp=2", "fsdp=2", "tp=2", "pp=2", "dp=2,pp=2")),
]


@pytest.mark.parametrize(("made", "strategy"), CASES)
def test_every_loss_equals_one_process(workers: Pools, made: Callable[[], Workload], strategy: str) -> None:
    """Also in the last batch, of 4 samples, and where four replicas share it."""
    check(workers, made, strategy)


def test_a_loss_of_the_whole_batch_that_is_cut_is_noticed(workers: Pools) -> None:
    alone = lambda: mock.patch.object(module_engine, "of_all_replicas", lambda tree, *_: tree)  # noqa: E731
    assert_noticed(workers, whole, "dp=2", alone)


def losses_by_name(strategy: str) -> list[Any]:
    program = Program.build(several(), Strategy.parse(strategy))
    assert prove_first_step(program).proved
    loss = program.step_share(next(program.loader().shares(0)))
    return [float(loss), {name: float(value) for name, value in program.losses.items()}]


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2,microbatches=2", "dp=2,tp=2"])
def test_each_loss_is_the_mean_over_the_batch(workers: Pools, strategy: str) -> None:
    ((alone, parts),) = [losses_by_name("single")]
    assert sum(parts.values()) == pytest.approx(alone)
    for loss, found in workers(Strategy.parse(strategy).workers, losses_by_name, strategy):
        assert loss == pytest.approx(alone)
        assert found == pytest.approx(parts)


@pytest.mark.parametrize(
    ("made", "strategy", "said"),
    [
        (whole, "pp=2,microbatches=2", "microbatches=2: a loss of the whole batch needs microbatches=1"),
        (whole, "dp=2,tp=2", "cuts the batch and the model"),
        (lambda: build(Scores, Scaled(), whole_batch=True), "dp=2", "works on one replica"),
    ],
)
def test_what_no_strategy_can_keep_is_refused(made: Callable[[], Workload], strategy: str, said: str) -> None:
    with pytest.raises((StrategyError, WorkloadError), match=said):
        in_one_batch(made(), Strategy.parse(strategy))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda output, batch: (output.mean(), {}), "loss of workload 'losses' is a tuple"),
        (lambda output, batch: output, r"has shape \(8, 4\)"),
        (lambda output, batch: {}, "is an empty dict"),
        (lambda output, batch: {"a": 1.0}, "loss 'a' of workload 'losses' is a float"),
    ],
)
@pytest.mark.parametrize("strategy", ["single", "tp=2"])
def test_a_loss_of_another_kind_is_refused(workers: Pools, loss: Any, said: str, strategy: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        workers(Strategy.parse(strategy).workers, step, build(Classes, loss), strategy)


def step(made: Workload, strategy: str) -> None:
    program = Program.build(made, Strategy.parse(strategy))
    program.step_share(next(program.loader().shares(0)))


def test_an_evaluation_has_the_loss_of_the_whole_batch(workers: Pools) -> None:
    evaluation = Evaluation(dataset=points(8), metric="zero", measure=lambda output, batch: output[0].sum() * 0)
    made = build(Scores, contrastive, whole_batch=True, evaluation=evaluation)
    (alone,) = [evaluated(made, "single")]
    for found in workers(2, evaluated, made, "dp=2"):
        assert found == pytest.approx(alone)


def evaluated(made: Workload, strategy: str) -> dict[str, float]:
    return Program.build(made, Strategy.parse(strategy)).evaluate()


def test_an_export_holds_the_model_alone(tmp_path: Path) -> None:
    program = Program.build(trained(), Strategy())
    saved = Checkpoints(tmp_path, 1)
    saved.save(program, {"epoch": 0})
    saved.wait()
    export_safetensors(tmp_path, tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert set(program.engine.held) - set(weights) == {"loss__temperature", "loss__prior"}
    Classes().double().load_state_dict(weights)
