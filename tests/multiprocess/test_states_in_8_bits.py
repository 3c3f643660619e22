"""Optimizer states in 8 bits train nearly as float32 states in one process do, and resume under every strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch
from equality import reference, train
from pool import Pools
from torch import Tensor

from shardwise.api import verify
from shardwise.errors import RequestError
from shardwise.parallel.optim.block_codes import BlockCodec, BlockCodes
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.strategy import Strategy
from shardwise.workload.recipes.language import language
from shardwise.workload.workload import Workload

STEPS = 20
BOUND = 1e-3
"""Largest relative difference of a loss from that of float32 states, over STEPS steps in which it falls by a fifth."""

STRATEGIES = ("single", "dp=2", "fsdp=2", "fsdp=2,zero=1", "fsdp=2,offload=1", "tp=2", "pp=2")


def work() -> Workload:
    return language(sequence=16, layers=2, hidden=64, batch_size=8)


def off(found: list[float], expected: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses(workers: Pools, strategy: str) -> None:
    expected = reference(workers, work, strategy, steps=STEPS)
    assert expected.losses[-1] < 0.85 * expected.losses[0]
    found = train(workers, work, f"{strategy},states=8", steps=STEPS)
    assert 0 < off(found.losses, expected.losses) < BOUND
    assert found.losses[:2] == pytest.approx(expected.losses[:2], rel=1e-6)  # states are rounded after an update


@contextmanager
def evenly() -> Iterator[None]:
    """Round to 256 values at equal distances, as is common for weights."""

    def narrow(codec: BlockCodec, tensor: Tensor) -> BlockCodes:
        return right(codec, (tensor / tensor.abs().amax() * 127).round() / 127 * tensor.abs().amax())

    right: Callable[[BlockCodec, Tensor], BlockCodes] = BlockCodec.narrow
    with mock.patch.object(BlockCodec, "narrow", narrow):
        yield


def run(strategy: str, folder: Path, steps: int, wrong: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Take steps after the newest checkpoint, if there is one, and save another one at the end.

    Returns the losses, and the states that this worker writes.
    """
    with evenly() if wrong else nullcontext():
        program = Program.build(work(), Strategy.parse(strategy))
        checkpoints = Checkpoints(folder)
        if (path := checkpoints.latest()) is not None:
            checkpoints.load(program, path)
        shares = islice(program.loader().shares(0), program.steps, program.steps + steps)
        losses = [float(program.step_share(share)) for share in shares]
        checkpoints.save(program, {})
        checkpoints.wait()
        pieces = [piece for piece in program.pieces() if piece.name.startswith("optimizer/") and piece.writes]
        return losses, {piece.name: piece.local.clone() for piece in pieces}


def test_codes_at_equal_distances_are_noticed(workers: Pools, tmp_path: Path) -> None:
    right = run("single", tmp_path / "right", STEPS)[0]
    assert off(run("single,states=8", tmp_path / "found", STEPS)[0], right) < BOUND
    assert off(run("single,states=8", tmp_path / "wrong", STEPS, wrong=True)[0], right) > BOUND


@pytest.mark.parametrize("first", ["single", "single,states=8", "fsdp=2,states=8", "fsdp=2,zero=1,states=8"])
def test_resume_under_any_strategy(workers: Pools, tmp_path: Path, first: str) -> None:
    expected = run("single", tmp_path / "whole", STEPS)[0]
    start = tmp_path / "start"
    workers(Strategy.parse(first).workers, run, first, start, STEPS // 2)
    for second in ("single", "single,states=8", "dp=2,states=8", "fsdp=2", "fsdp=2,states=8", "tp=2,states=8"):
        folder = tmp_path / second
        (folder / "checkpoints").mkdir(parents=True)
        name = f"step-{STEPS // 2:08d}"
        (folder / "checkpoints" / name).symlink_to(start / "checkpoints" / name)
        losses = workers(Strategy.parse(second).workers, run, second, folder, STEPS // 2)[0][0]
        assert off(losses, expected[STEPS // 2 :]) < BOUND, second


def test_checkpoints_are_float32_and_read_back_unchanged(workers: Pools, tmp_path: Path) -> None:
    before = run("single,states=8", tmp_path, 3)[1]
    after = run("single,states=8", tmp_path, 0)[1]
    moments = [name for name, tensor in before.items() if tensor.dim()]
    assert len(moments) > 10
    assert all(before[name].dtype == torch.float32 for name in moments)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("warm_workers")
def test_verify_takes_the_first_step_alone() -> None:
    with pytest.raises(RequestError, match=r"states=8 rounds the optimizer states .* verify it with --steps 1"):
        verify(work, ["dp=2,states=8"])
    (result,) = verify(work, ["dp=2,states=8"], steps=1)["results"]
    assert result["passed"]
