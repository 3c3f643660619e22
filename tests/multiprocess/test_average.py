"""A moving average of the weights: torch's, under every strategy, in checkpoints, evaluated and exported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import points
from pool import Pools
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shardwise.errors import CheckpointError, WorkloadError
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.workload import Workload

STEPS, DECAY = 4, 0.7


class Model(nn.Sequential):
    """Build a model with a frozen layer, tied weights and batch norm."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.append(nn.Linear(16, 16)).append(nn.Tanh()).append(nn.Linear(16, 4))
        self[5].weight = self[3].weight
        self[0].requires_grad_(False)


def made(average: float | None = DECAY) -> Workload:
    return Workload(
        name="average",
        model=lambda: Model().double(),
        dataset=points(8 * STEPS),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        batch_size=8,
        evaluation=Evaluation(
            dataset=points(10), metric="size", measure=lambda output, batch: output.square().mean(), name="held"
        ),
        average=average,
    )


def by_torch() -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    """Averaged weights, what they score, and the trained weights of a plain loop."""
    workload = made()
    torch.manual_seed(workload.seed)
    model = workload.model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    optimizer = workload.optimizer([p for p in model.parameters() if p.requires_grad])
    loader = Program.build(workload, Strategy()).loader()
    for share in loader.shares(0):
        data = share.microbatches[0].data
        optimizer.zero_grad()
        workload.loss(model(data[0]), data).backward()
        optimizer.step()
        averaged.update_parameters(model)
    held = points(10).tensors
    output = averaged.module.eval()(held[0]).detach()
    scores = {"loss": float(F.cross_entropy(output, held[1])), "size": float(output.square().mean())}
    return averaged.module.state_dict(), scores, model.state_dict()


def run(strategy: str, folder: Path, until: int) -> tuple[Any, dict[str, float], Any]:
    """Steps from the newest checkpoint on where there is one; a checkpoint at the end."""
    program, checkpoints = Program.build(made(), Strategy.parse(strategy)), Checkpoints(folder)
    if path := checkpoints.latest():
        checkpoints.load(program, path)
    else:
        assert prove_first_step(program).proved
    for share in program.loader().shares(0, program.steps):
        program.step_share(share)
        if program.steps == until:
            break
    scores = program.evaluate()
    checkpoints.save(program, {})
    checkpoints.wait()
    with program.averaged():
        averaged = program.full_state_dict()
    return averaged, scores, program.full_state_dict()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "dp=2"),
        ("dp=2", "fsdp=2"),
        ("fsdp=2", "tp=2"),
        ("tp=2", "pp=2,microbatches=1"),
        ("pp=2,microbatches=1", "single"),
        ("fsdp=2,zero=1", "dp=2,tp=2"),
    ],
)
def test_it_is_that_of_torch_also_if_the_run_goes_on_otherwise(
    workers: Pools, tmp_path: Path, before: str, after: str
) -> None:
    averaged, scores, trained = by_torch()
    workers(Strategy.parse(before).workers, run, before, tmp_path, 2)
    found = workers(Strategy.parse(after).workers, run, after, tmp_path, STEPS)
    assert_close(found[0][0], averaged)
    assert_close(found[0][2], trained)
    for _, values, _ in found:
        assert values == pytest.approx(scores, rel=1e-9)
    export_safetensors(tmp_path, tmp_path / "out")
    assert_close(load_file(tmp_path / "out"), averaged)


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    plain, checkpoints = Program.build(made(None), Strategy()), Checkpoints(tmp_path)
    checkpoints.save(plain, {})
    checkpoints.wait()
    path = checkpoints.latest()
    assert path is not None
    with pytest.raises(CheckpointError, match="has no moving average of the weights: go on without `average`"):
        checkpoints.load(Program.build(made(), Strategy()), path)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.9"])
def test_a_decay_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(WorkloadError, match=f"average={value}: must be a decay from 0 to 1"):
        made(value)
