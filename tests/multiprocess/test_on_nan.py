"""A step whose loss or gradient is not finite: all workers find the same, name where it began, and do the same."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import DOUBLE_TOLERANCE, paste, portable, tensor_error
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from traces import remembered

from shardwise.errors import NotFinite
from shardwise.parallel.program import Program
from shardwise.run.training.guard import Guard
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

BATCH, STEPS, BAD_STEP = 8, 4, 2
BAD_SAMPLE = (BAD_STEP - 1) * BATCH + 5
"""In the second half of its batch: on the last replica."""

STRATEGIES = ["dp=2", "fsdp=2", "tp=2", "pp=2", "tp=2,pp=2", "dp=2,fsdp=2", "fsdp=2,zero=1", "dp=2,tp=2"]


class Root(nn.Module):
    """Square roots of what is at least 0: at 0 the output is finite and the gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Model(nn.Module):
    """Batch norm, dropout, and three modules in which a number can go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8, bias=False)  # the norm takes it away, and its gradient would be rounding
        self.norm = nn.BatchNorm1d(8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8))
        self.root = Root()
        self.last = nn.Linear(8, 4)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, factor, root = batch
        x = self.middle[0](torch.relu(self.norm(self.first(x))))
        x = self.middle[2](self.middle[1](x * factor))  # a factor of inf is what `middle.0` does not see
        output: Tensor = self.last(x + self.root(root * x))
        return output


def workload(value: float, column: int) -> Workload:
    """One sample has `value`: in column 0, what the model gets; 1, a factor in its middle; 2, one before the root."""
    generator = torch.Generator().manual_seed(3)
    samples = BATCH * STEPS
    columns = [torch.randn(samples, 4, generator=generator).double(), *torch.ones(2, samples, 1).double()]
    columns[column][BAD_SAMPLE] = value
    return Workload(
        name="sick",
        model=lambda: Model().double(),
        dataset=TensorDataset(*columns, torch.randint(0, 4, (samples,), generator=generator)),
        inputs=lambda batch: (tuple(batch[:3]),),
        loss=lambda output, batch: F.cross_entropy(output, batch[3]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        batch_size=BATCH,
    )


def run(strategy: str, policy: str, value: float, column: int) -> dict[str, Any]:
    """All steps in the dataset's own order, or up to the one at which it stops."""
    with remembered(workload):
        program = Program.build(workload(value, column), Strategy.parse(strategy))
    said: list[str] = []
    losses = []
    guard = Guard(program, policy, said.append)
    try:
        losses = [float(program.step_share(share)) for share in program.loader(shuffle=False).shares(0)]
    except NotFinite as error:
        said.append(str(error))
    pieces = [portable(piece) for piece in program.pieces()]
    state = {"state": program.state(), "skipped": guard.skipped, "finite": program.is_finite()}
    return {"losses": [repr(loss) for loss in losses], "said": said, **state, "pieces": pieces}


def alike(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values that the workers agree on, with full tensors."""
    for result in results[1:]:
        assert {**result, "pieces": None} == {**results[0], "pieces": None}
    return {**results[0], "tensors": paste([piece for result in results for piece in result["pieces"]])}


def both(workers: Pools, strategy: str, *case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A strategy and one process."""
    settled = Strategy.parse(strategy)
    alone = str(Strategy(microbatches=settled.for_batch(BATCH).microbatches))
    return alike(workers(settled.workers, run, strategy, *case)), alike([run(alone, *case)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("column", [0, 2])
def test_a_skipped_step_is_that_of_one_process(workers: Pools, strategy: str, column: int) -> None:
    """A loss of nan (column 0), and a gradient of nan where the loss is finite (column 2)."""
    value = float("nan") if column == 0 else 0.0
    parallel, alone = both(workers, strategy, "skip", value, column)
    assert parallel["skipped"] == alone["skipped"] == 1
    assert parallel["finite"]
    assert len(parallel["said"]) == len(alone["said"]) == 1
    assert parallel["state"] == alone["state"]
    assert parallel["state"]["steps"] == STEPS
    assert parallel["state"]["scheduler"]["last_epoch"] == STEPS - 1  # it does not move at a step that is skipped
    error, name = tensor_error(parallel["tensors"], alone["tensors"])
    assert error < DOUBLE_TOLERANCE, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_comes_first_is_named(workers: Pools, strategy: str) -> None:
    """The factor makes the second layer of the middle the first module whose output is not finite."""
    (said,) = alike(workers(Strategy.parse(strategy).workers, run, strategy, "stop", float("inf"), 1))["said"]
    assert said.startswith(f"step {BAD_STEP}: the loss is nan; the first that is not finite is module 'middle.1'")
    rank = {"dp=2": 1, "fsdp=2": 1, "fsdp=2,zero=1": 1, "dp=2,fsdp=2": 2, "dp=2,tp=2": 2}
    if strategy in rank:
        assert f"on worker {rank[strategy]} (inf)" in said


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_of_the_step_is_applied_where_it_stops(workers: Pools, strategy: str) -> None:
    """Check that only the steps before are left, bit for bit."""
    stopped = alike(workers(Strategy.parse(strategy).workers, run, strategy, "stop", float("nan"), 0))
    before = alike(workers(Strategy.parse(strategy).workers, first_steps, strategy))
    assert stopped["state"] == before["state"]
    assert stopped["state"]["steps"] == BAD_STEP - 1
    for name, tensor in before["tensors"].items():
        assert torch.equal(stopped["tensors"][name], tensor), name


def first_steps(strategy: str) -> dict[str, Any]:
    """The steps before the one that is not finite, without a guard."""
    with remembered(workload):
        program = Program.build(workload(float("nan"), 0), Strategy.parse(strategy))
    shares = program.loader(shuffle=False).shares(0)
    for _ in range(BAD_STEP - 1):
        program.step_share(next(shares))
    assert isinstance(shares, Generator)
    shares.close()
    return {"state": program.state(), "pieces": [portable(piece) for piece in program.pieces()]}


@pytest.mark.parametrize(
    ("strategy", "where"), [("dp=2", "on worker 1 "), ("pp=2", "on worker 1 "), ("tp=2", ""), ("fsdp=2", "")]
)
def test_a_gradient_is_named_where_the_loss_is_finite(workers: Pools, strategy: str, where: str) -> None:
    """On which worker it began is said where that can be known: not once several have added theirs up."""
    (said,) = alike(workers(2, run, strategy, "stop", 0.0, 2))["said"]
    assert said.startswith(f"step {BAD_STEP}: the gradient is not finite (the loss is ")
    assert f"the first that is not finite is the gradient of middle.2.bias {where}(nan)" in said
