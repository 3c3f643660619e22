"""`compress`: what replicas send and what they then owe is the exact gradient, in every engine and form."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from equality import DOUBLE_TOLERANCE, assert_equal, paste, portable, reference, shares_of, train
from pool import Pools
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from traces import remembered

from shardwise.options import Compression
from shardwise.parallel.data.compression.powersgd import PowerSGD
from shardwise.parallel.data.compression.reducer import CompressedReducer, Owed
from shardwise.parallel.data.reducer import Flat
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.verification.deviation import Deviation
from shardwise.run.verification.verify import _conserved
from shardwise.strategy import Strategy
from shardwise.workload.float64 import in_float64
from shardwise.workload.loading import Loading
from shardwise.workload.recipes.language import language
from shardwise.workload.workload import Workload

KINDS = ("powersgd:2", "topk:0.05", "int8", "sign", "fp8", "bf16")
STRATEGIES = (
    "dp=2",
    "fsdp=2",
    "fsdp=2,zero=1",
    "dp=2,fsdp=2",
    "dp=2,tp=2",
    "dp=2,pp=2",
    "fsdp=2,tp=2",
    "dp=2,compile=1",
)
ENGINES = ("dp=2", "fsdp=2", "dp=2,tp=2")
"""A strategy of each engine."""

PROMISED = ("compress=powersgd:2,microbatches=2", "compress=int8")
MORE_PROMISED = ("compress=powersgd:2", "compress=int8,microbatches=2")

SHAPES = ((40, 30), (7,), (33, 9), (3, 5))
ROUNDING = 1e-12
"""In float64, of sums of numbers near 1."""

Breaking = Callable[[], AbstractContextManager[Any]]


@contextmanager
def forgetting() -> Iterator[None]:
    """Drop the error feedback: each step begins without errors."""

    def of(owed: Owed, what: Flat, like: Tensor) -> Tensor:
        right(owed, what, like).zero_()
        return right(owed, what, like)

    right = Owed.of
    with mock.patch.object(Owed, "of", of):
        yield


# ---- the reducer alone ----------------------------------------------------------------------------------------------


def reduced(kind: str, form: str, breaking: Breaking = nullcontext) -> tuple[float, Tensor]:
    """Join three random gradients of this worker. Returns the largest break of the promise, and the last result."""
    group = dist.group.WORLD
    assert group is not None
    with breaking():
        reducer = CompressedReducer(group, Compression.parse("compress", kind), lambda: False)
        ranks, worst, result = group.size(), 0.0, torch.empty(0)
        what = Flat(tuple("abcd"), SHAPES, ranks if form == "scattered" else 0)
        generator = torch.Generator().manual_seed(group.rank())
        for _ in range(3):
            drawn = {n: torch.randn(s, generator=generator).double() for n, s in zip("abcd", SHAPES, strict=True)}
            flat = what.join(drawn, torch.empty(0, dtype=torch.float64))
            before = summed(what, reducer, flat)
            exact = everybodys(flat)
            if form == "scattered":
                part = flat.new_empty(len(flat) // ranks)
                reducer.reduce_scatter(part, flat, what)
                result = flat.new_empty(len(flat))
                dist.all_gather_into_tensor(result, part)
                result *= ranks
            else:
                reducer.all_reduce(flat, what, mean=form == "mean").wait()
                result = flat * (ranks if form == "mean" else 1)
            left = what.split(result + summed(what, reducer, flat) - before - exact)  # without padding
            worst = max(worst, *(float(each.abs().max()) for each in left.values()))
    return worst, result


def everybodys(flat: Tensor) -> Tensor:
    total = flat.clone()
    dist.all_reduce(total)
    return total


def summed(what: Flat, reducer: CompressedReducer, like: Tensor) -> Tensor:
    """Return the errors of all workers together."""
    return everybodys(what.join(reducer.pieces(), like))


@pytest.mark.parametrize("form", ["sum", "mean", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_and_owed_is_the_exact_sum(workers: Pools, kind: str, form: str) -> None:
    for count in (2, 3):
        found = workers(count, reduced, kind, form)
        assert max(worst for worst, _ in found) < ROUNDING
        assert all(torch.equal(result, found[0][1]) for _, result in found)


@pytest.mark.parametrize("form", ["sum", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_that_are_dropped_are_noticed(workers: Pools, kind: str, form: str) -> None:
    assert min(worst for worst, _ in workers(2, reduced, kind, form, forgetting)) > 1e-3


# ---- programs -------------------------------------------------------------------------------------------------------


def work() -> Workload:
    return in_float64(language(sequence=16, layers=2, hidden=64, batch_size=8, tied=True))


def kept(strategy: str, breaking: Breaking = nullcontext) -> Deviation:
    with breaking(), remembered(work):
        return _conserved(Program.build(work(), Strategy.parse(strategy)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_engine_keeps_the_promise(workers: Pools, strategy: str) -> None:
    for options in PROMISED + (MORE_PROMISED if strategy in ENGINES else ()):
        found = workers(Strategy.parse(strategy).workers, kept, f"{strategy},{options}")[0]
        assert found.error < DOUBLE_TOLERANCE, (options, found)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=2,tp=2"])
def test_an_engine_without_feedback_is_noticed(workers: Pools, strategy: str) -> None:
    found = workers(Strategy.parse(strategy).workers, kept, f"{strategy},compress=sign", forgetting)[0]
    assert found.error > 0.01, found


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=2,fsdp=2", "dp=2,pp=2"])
def test_plain_steps_are_exact_and_later_ones_are_not(workers: Pools, strategy: str) -> None:
    expected = reference(workers, work, strategy)
    assert_equal(train(workers, work, f"{strategy},compress=sign,plain_steps=3"), expected, DOUBLE_TOLERANCE)
    found = train(workers, work, f"{strategy},compress=sign,plain_steps=2")
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert any(not torch.allclose(found.gradients[name], each) for name, each in expected.gradients.items())


# ---- learning -------------------------------------------------------------------------------------------------------

WIDTH, FAR = 512, 10.0


class Point(nn.Module):
    """A point, which is the output for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, targets: Tensor) -> Tensor:
        return self.place.expand_as(targets)


def opposed() -> Workload:
    """Two samples far from each other on either side of their middle: the signs of their gradients cancel."""
    generator = torch.Generator().manual_seed(1)
    middle = torch.randn(WIDTH, generator=generator)
    apart = FAR * torch.randn(WIDTH, generator=generator).sign()
    return Workload(
        name="opposed",
        model=Point,
        dataset=TensorDataset(torch.stack([middle + apart, middle - apart])),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: (output - batch[0]).square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=5.0),
        batch_size=2,
        loading=Loading(shuffle=False),
    )


def distance(strategy: str, breaking: Breaking = nullcontext) -> float:
    """Return how far the point is from the middle after training, relative to the beginning."""
    with breaking():
        program = Program.build(opposed(), Strategy.parse(strategy))
        samples = program.workload.dataset.tensors[0]
        places = []
        for number, share in enumerate(shares_of(program, 300)):
            program.step_share(share)
            if number >= 250:
                places.append(program.full_state_dict())
        found = [each["place"] for each in places if each is not None]
        middle = samples.mean(0)
        return float((torch.stack(found).mean(0) - middle).norm() / middle.norm()) if found else 0.0


def test_signs_with_feedback_learn_what_signs_without_do_not(workers: Pools) -> None:
    assert workers(2, distance, "dp=2")[0] < 0.01
    assert workers(2, distance, "dp=2,compress=sign")[0] < 0.1
    assert workers(2, distance, "dp=2,compress=sign", forgetting)[0] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_near_those_of_exact_training(workers: Pools, kind: str) -> None:
    steps = 12
    expected = reference(workers, work, "dp=2", steps)
    found = train(workers, work, f"dp=2,compress={kind}", steps)
    fallen = expected.losses[0] - expected.losses[-1]
    assert found.losses[-1] < expected.losses[-1] + 0.25 * fallen


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def owed(folder: Path, strategy: str, steps: int) -> list[Any]:
    """Go on from the newest checkpoint, and leave one. Returns what is owed before the first step and at the end."""
    with remembered(work):
        program = Program.build(work(), Strategy.parse(strategy))
    checkpoints = Checkpoints(folder)
    if path := checkpoints.latest():
        checkpoints.load(program, path)
    first = [portable(piece) for piece in program.pieces() if piece.name.startswith("owed/")]
    for share in shares_of(program, steps):
        program.step_share(share)
    checkpoints.save(program, {})
    checkpoints.wait()
    last = [portable(piece) for piece in program.pieces() if piece.name.startswith("owed/")]
    return [first, last]


def merged(parts: list[Any], index: int) -> dict[str, Tensor]:
    return paste([piece for part in parts for piece in part[index]])


@pytest.fixture(scope="module")
def begun(workers: Pools, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any]]]:
    """`begun(strategy)` -> the folder of two steps under a strategy, and what its workers owe after them."""

    @cache
    def found(strategy: str) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("begun")
        return folder, workers(Strategy.parse(strategy).workers, owed, folder, f"{strategy},compress=int8", 2)

    return found


@pytest.mark.parametrize("first", ["dp=2", "fsdp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("then", ["dp=2", "fsdp=2", "dp=2,fsdp=2", "dp=2,tp=2", "dp=2,pp=2"])
def test_what_is_owed_resumes_under_any_strategy(
    workers: Pools, tmp_path: Path, begun: Callable[[str], tuple[Path, list[Any]]], first: str, then: str
) -> None:
    folder, before = begun(first)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    after = workers(Strategy.parse(then).workers, owed, tmp_path, f"{then},compress=sign", 0)
    expected, found = merged(before, 1), merged(after, 0)
    assert expected.keys() == found.keys()
    assert any(float(each.abs().max()) > 0 for each in expected.values())
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each)


def test_a_training_may_begin_and_end_to_compress(workers: Pools, tmp_path: Path) -> None:
    for strategy in ("dp=2", "dp=2,compress=int8", "fsdp=2", "single"):
        workers(Strategy.parse(strategy).workers, owed, tmp_path, strategy, 1)


# ---- torch's own ----------------------------------------------------------------------------------------------------


def of_torch() -> tuple[Tensor, Tensor]:
    """Return the last of three gradients of one matrix, joined by torch's PowerSGD hook and by the reducer."""
    group, rank = dist.group.WORLD, 2
    assert group is not None
    reducer = CompressedReducer(group, Compression.parse("compress", f"powersgd:{rank}"), lambda: False)
    what = Flat(("weight",), ((24, 32),))
    module = nn.Linear(32, 24, bias=False)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    method = reducer.method
    assert isinstance(method, PowerSGD)
    drawing = torch.Generator().manual_seed(int(np.random.RandomState(0).randint(1_000_000_000)))
    method.starts["weight"] = torch.randn(1, 32, rank, generator=drawing)[0]  # as torch draws it
    generator = torch.Generator().manual_seed(group.rank())
    theirs = mine = torch.empty(0)
    for step in range(5):
        x = torch.randn(8, 32, generator=generator)
        module.weight.grad = None
        flat = torch.autograd.grad(module(x).square().mean(), module.weight)[0].reshape(-1)
        model(x).square().mean().backward()
        if step < 2:  # torch sums these exactly
            continue
        assert module.weight.grad is not None
        theirs = module.weight.grad.reshape(-1).clone()
        reducer.all_reduce(flat, what, mean=True).wait()
        mine = flat.clone()
    return theirs, mine


def test_powersgd_is_that_of_torch(workers: Pools) -> None:
    for theirs, mine in workers(2, of_torch):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


# ---- workers of one replica -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dp=2,tp=2", "fsdp=2,tp=2"])
@pytest.mark.parametrize("kind", ["topk:0.05", "sign"])
def test_what_tensor_shards_hold_whole_stays_equal_on_them(workers: Pools, strategy: str, kind: str) -> None:
    """Pieces that several workers hold are compared when they are merged."""
    train(workers, work, f"{strategy},compress={kind}")
