"""A training that stops under one strategy goes on under any other as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pool import Pools
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

BEFORE, AFTER = 3, 3


class Model(nn.Module):
    """Tied weights, batch norm, dropout and an odd number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1)) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        output: Tensor = self.head(self.norm(x))
        return output


def workload() -> Workload:
    return Workload(
        name="tied",
        model=Model,
        dataset=TensorDataset(*samples()),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BEFORE + AFTER),
        batch_size=8,
    )


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 11, (8 * (BEFORE + AFTER), 2), generator=generator).unbind(1))


def batch(step: int) -> list[Tensor]:
    return [column[step * 8 : (step + 1) * 8] for column in samples()]


def run(strategy: str, folder: Path | None, steps: int) -> list[float]:
    """Losses of the next steps; from the newest checkpoint on where there is one, and with one at the end."""
    program = Program.build(workload(), Strategy.parse(strategy))
    checkpoints = None if folder is None else Checkpoints(folder)
    if checkpoints is not None and (path := checkpoints.latest()):
        assert checkpoints.load(program, path) == {"batch": program.steps}
    losses = [program.step(batch(program.steps)).item() for _ in range(steps)]
    if checkpoints is not None:
        checkpoints.save(program, {"batch": program.steps})
        checkpoints.wait()
    return losses


STRATEGIES = ["single", "dp=2", "fsdp=2", "fsdp=2,zero=2", "fsdp=2,zero=1", "dp=2,fsdp=2"]


def workers_of(strategy: str) -> int:
    return Strategy.parse(strategy).workers


@pytest.fixture(scope="module")
def uninterrupted() -> list[float]:
    return run("single", None, BEFORE + AFTER)


@pytest.mark.parametrize("first", STRATEGIES)
def test_resume_under_any_strategy(workers: Pools, tmp_path: Path, uninterrupted: list[float], first: str) -> None:
    start = tmp_path / "start"
    losses = workers(workers_of(first), run, first, start, BEFORE)[0]
    assert losses == pytest.approx(uninterrupted[:BEFORE], rel=1e-5)
    weights = {}
    for second in STRATEGIES:
        folder = tmp_path / second
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000003").symlink_to(start / "checkpoints" / "step-00000003")
        losses = workers(workers_of(second), run, second, folder, AFTER)[0]
        assert losses == pytest.approx(uninterrupted[BEFORE:], rel=1e-5), second
        export_safetensors(folder, folder / "model.safetensors")
        weights[second] = load_file(folder / "model.safetensors")
    for second, state in weights.items():
        Model().load_state_dict(state)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, weights["single"][name], rtol=1e-4, atol=1e-6, msg=f"{second} {name}")
