"""Several evaluations and metrics that are no mean: every strategy reports what one process reports."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import points
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.errors import NotProved, WorkloadError
from shardwise.parallel.data import collected
from shardwise.parallel.program import Program
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.workload import Workload


class Middle:
    """The median of the largest outputs times the labels: not to be had from the values of parts."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.reset()

    def update(self, output: dict[str, Tensor], batch: Any) -> None:
        assert output["fixed"] == 3
        self.seen.append(output["scores"].amax(1) * (1 + batch[1]) * self.factor)

    def compute(self) -> Tensor:
        return torch.cat(self.seen).median()

    def reset(self) -> None:
        self.seen: list[Tensor] = []


class Ordered(Middle):
    """Depends on the order of the samples."""

    def compute(self) -> Tensor:
        seen = torch.cat(self.seen)
        return (seen * torch.arange(len(seen))).sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"scores": self.layers(x), "fixed": 3, "x": x}


def accuracy(output: Any, batch: Any) -> Tensor:
    right: Tensor = output["scores"].argmax(1) == batch[1]
    return right.double().mean()


def other(samples: int) -> TensorDataset:
    """Samples with one tensor more: other evaluations may have batches of their own."""
    return TensorDataset(*points(samples).tensors, torch.zeros(samples))


def made(**changes: Any) -> Workload:
    fields: dict[str, Any] = {
        "evaluation": [
            Evaluation(dataset=points(13), metric="accuracy", measure=accuracy),
            Evaluation(dataset=other(11), metric="middle", measure=lambda: Middle(2.0), name="other", batch_size=4),
            Evaluation(dataset=points(9), metric="ordered", measure=Ordered, name="third"),
        ]
    }
    return Workload(
        **{
            "name": "evaluations",
            "model": lambda: Model().double(),
            "dataset": points(20),
            "inputs": lambda batch: batch[0],
            "loss": lambda output, batch: F.cross_entropy(output["scores"], batch[1]),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
            "batch_size": 8,
            **fields,
            **changes,
        }
    )


def evaluated(workload: Workload, strategy: str) -> dict[str, float]:
    program = Program.build(workload, Strategy.parse(strategy))
    assert prove_first_step(program).proved
    program.step_share(next(program.loader().shares(0)))
    return program.evaluate()


@pytest.mark.parametrize(
    "strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2", "dp=2,tp=2", "dp=2,pp=2,microbatches=2", "dp=4,microbatches=2"]
)
def test_every_evaluation_equals_one_process(workers: Pools, strategy: str) -> None:
    alone = evaluated(made(), "single")
    assert list(alone) == ["loss", "accuracy", "other/loss", "other/middle", "third/loss", "third/ordered"]
    for found in workers(Strategy.parse(strategy).workers, evaluated, made(), strategy):
        assert found == pytest.approx(alone, rel=1e-10)


def test_only_those_asked_for_are_made() -> None:
    program = Program.build(made(), Strategy())
    assert list(program.evaluate([1])) == ["other/loss", "other/middle"]


def test_an_object_that_takes_in_one_replica_is_noticed(workers: Pools) -> None:
    alone = evaluated(made(), "single")

    def broken() -> dict[str, float]:
        with mock.patch.object(collected, "of_all_replicas", lambda tree, *_: tree):
            return evaluated(made(), "dp=2")

    found = workers(2, broken)[0]
    assert found["accuracy"] == pytest.approx(alone["accuracy"])
    assert found["third/ordered"] != pytest.approx(alone["third/ordered"])


def rescored(strategy: str) -> tuple[float, float]:
    factor = [1.0]
    scaled = Evaluation(
        dataset=points(9),
        metric="scaled",
        measure=lambda output, batch: output["scores"].square().mean() * factor[0],
        name="second",
    )
    first = Evaluation(dataset=points(13), metric="accuracy", measure=accuracy)
    program = Program.build(made(evaluation=[first, scaled]), Strategy.parse(strategy))
    before = program.evaluate([1])["second/scaled"]
    factor[0] = 2.0
    return before, program.evaluate([1])["second/scaled"]


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2"])
def test_a_later_evaluation_reads_what_has_changed_in_python(workers: Pools, strategy: str) -> None:
    for before, after in workers(2, rescored, strategy):
        assert after == pytest.approx(2 * before)


def single(samples: int) -> TensorDataset:
    """Samples in float32."""
    x, labels = points(samples).tensors
    return TensorDataset(x.float(), labels)


class Wideness(Middle):
    """Refuses outputs that are not wide."""

    def update(self, output: Any, batch: Any) -> None:
        assert output["scores"].dtype == torch.float32
        super().update(output, batch)


@pytest.mark.parametrize("strategy", ["dp=2", "tp=2", "pp=2"])
def test_outputs_of_half_precision_are_collected_as_wide_ones(workers: Pools, strategy: str) -> None:
    half = made(
        model=Model,
        dataset=single(20),
        evaluation=Evaluation(dataset=single(9), metric="middle", measure=Wideness),
        precision="bf16",
    )
    alone = evaluated(half, "single")
    for found in workers(2, evaluated, half, strategy):
        assert found == pytest.approx(alone, rel=0.05)


class Synchronised:
    """A metric of torchmetrics, which joins the states of all workers when it computes unless it finds itself alone."""

    distributed_available_fn = staticmethod(torch.distributed.is_initialized)

    def value(self, seen: Tensor) -> Tensor:
        assert not self.distributed_available_fn(), "would wait for workers without outputs, and count all of them"
        return seen.median()


class Wrapping(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.inner = {"metric": [Synchronised()]}

    def compute(self) -> Tensor:
        return self.inner["metric"][0].value(torch.cat(self.seen))


def test_a_metric_that_joins_workers_by_itself_does_not(workers: Pools) -> None:
    workload = made(evaluation=Evaluation(dataset=points(9), metric="middle", measure=Wrapping))
    alone = evaluated(workload, "single")
    for found in workers(2, evaluated, workload, "dp=2"):
        assert found == pytest.approx(alone)


class Failing(Middle):
    def update(self, output: Any, batch: Any) -> None:
        raise KeyError("scores")


class Wide(Middle):
    def compute(self) -> Tensor:
        return torch.cat(self.seen)


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda: Failing(), "metric 'odd' of workload 'evaluations' fails in update: KeyError: 'scores'"),
        (lambda: 3, "measure of evaluation 'odd' takes no arguments, so it must return an object .* int has no update"),
        (lambda: 1 / 0, "metric 'odd' of workload 'evaluations' fails in measure: ZeroDivisionError"),
    ],
)
def test_a_broken_object_is_refused_before_the_first_step(measure: Any, said: str) -> None:
    workload = made(evaluation=Evaluation(dataset=points(9), metric="odd", measure=measure))
    with pytest.raises(NotProved, match=said):
        prove_first_step(Program.build(workload, Strategy()))


def test_a_metric_of_several_numbers_is_refused() -> None:
    workload = made(evaluation=Evaluation(dataset=points(9), metric="wide", measure=Wide))
    with pytest.raises(WorkloadError, match=r"metric 'wide' .* computes a tensor of shape \(9,\): must be one number"):
        Program.build(workload, Strategy()).evaluate()


def lengths(count: int) -> Any:
    """Samples of which the first have more tokens, collated to the longest of their own microbatch."""
    return [(torch.zeros(6).double(), torch.tensor(1), torch.zeros(2 + (n < count // 2))) for n in range(count)]


def test_replicas_with_batches_of_other_shapes_are_refused(workers: Pools) -> None:
    workload = made(evaluation=Evaluation(dataset=lengths(8), metric="middle", measure=Middle))

    def run() -> None:
        Program.build(workload, Strategy(dp=2)).evaluate()

    with pytest.raises(WorkloadError, match=r"samples of replicas 0 and 1 have shapes \(3,\) and \(2,\)"):
        workers(2, run)
