"""Dry runs of jobs of any size: what one worker of thousands does, without memory."""

from __future__ import annotations

import resource
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from traces import remembered

from shardwise.collective import Group
from shardwise.errors import DataError, StrategyError
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.predict.dry_run.fakes import _Chunks
from shardwise.splitting.balance import Cuts
from shardwise.splitting.ownership import assign_owners
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt
from shardwise.workload.workload import Workload

GIB = 2**30


def sized(**changes: Any) -> Workload:
    sizes: dict[str, Any] = {"layers": 8, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocabulary": 32000}
    return gpt(**{**sizes, "sequence": 1024, **changes})


def large(spec: str, rank: int = 0, batch_size: int = 64, cuts: Cuts | None = None, **changes: Any) -> DryRun:
    """A worker of a model with 6.9 B parameters, 27.5 GB of float32."""
    with remembered(f"large {changes}"):
        return dry_run(sized(batch_size=batch_size, **changes), Strategy.parse(spec), rank, cuts=cuts)


def counted(run: DryRun) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(operation, axis, when) -> (how many, bytes)."""
    numbers: Counter[Any] = Counter()
    sizes: Counter[Any] = Counter()
    for each in run.collectives:
        numbers[each.operation, each.axis, each.when] += 1
        sizes[each.operation, each.axis, each.when] += each.bytes
    return {key: (number, sizes[key]) for key, number in numbers.items()}


LAYER = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672 + 2 * 8192
EMBEDDING = 32000 * 8192
ALL = 8 * LAYER + 2 * EMBEDDING + 8192


def test_a_worker_of_four_thousand_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = large("fsdp=4096", rank=17, batch_size=4096)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert run.memory.total > 12 * GIB
    found = counted(run)
    # rows are cut into 4,096 parts of one size: 10,240 of the fused projections become 12,288, 32,000 words 32,768
    padding = 8 * 2048 * 8192 + 2 * 768 * 8192
    gathers, size = found["all_gather", "fsdp", "forward"]
    assert (gathers, size) == (9, 2 * (ALL + padding))  # in bfloat16
    assert found["reduce_scatter", "fsdp", "backward"] == (9, 2 * size)
    assert {each.group for each in run.collectives} == {Group(4096)}
    assert run.memory.optimizer == pytest.approx(8 * (ALL + padding) / 4096, rel=1e-3)


def test_groups_of_a_worker_in_the_middle() -> None:
    # ranks: dp outermost, then pp, then tp: 16 * 8 per replica
    run = large("dp=32,pp=4,tp=8,microbatches=2", rank=5 * 32 + 2 * 8 + 3)
    groups = {(each.operation, each.axis): each.group for each in run.collectives if each.axis != "pp"}
    assert groups["all_reduce", "tp"] == Group(8, 1, 5 * 32 + 16)
    assert groups["all_reduce", "dp"] == Group(32, 32, 2 * 8 + 3)
    assert groups["all_reduce", "world"] == Group(1024)
    messages = {each.group for each in run.collectives if each.axis == "pp"}
    assert messages == {Group(2, 8, 5 * 32 + 8 + 3), Group(2, 8, 5 * 32 + 16 + 3)}
    assert counted(run)["send", "pp", "forward"][0] == counted(run)["recv", "pp", "backward"][0]


def test_flops_are_those_of_the_model() -> None:
    run = large("dp=64,tp=8", layers=2)
    tokens = 1024
    products = 2 * (2 * (LAYER - 2 * 8192) + EMBEDDING) * tokens
    attention = 2 * 2 * 2 * tokens * tokens * 8192
    assert run.flops == pytest.approx((3 * products + 3.5 * attention) / 8, rel=0.01)
    whens = {kernel.when for kernel in run.kernels}
    assert whens == {"forward", "backward", "optimizer"}


def test_recomputation_is_a_phase_of_its_own() -> None:
    run = large("tp=8,recompute=full", layers=2, batch_size=32)
    again = [kernel for kernel in run.kernels if kernel.when == "recompute"]
    assert sum(kernel.flops for kernel in again) > 0.2 * sum(k.flops for k in run.kernels if k.when == "forward")
    assert run.memory.activations < large("tp=8", layers=2, batch_size=32).memory.activations


def test_cuts_are_taken() -> None:
    run = large("pp=4,microbatches=2", batch_size=2)
    assert run.cuts is not None
    assert len(run.cuts) == 4
    moved = tuple((start + 1 if start else 0,) for (start,) in run.cuts)
    other = large("pp=4,microbatches=2", batch_size=2, cuts=moved)
    assert other.cuts == moved
    assert other.memory.parameters > run.memory.parameters


@pytest.mark.parametrize("cuts", [((0,), (9,)), ((0,), (9,), (8,), (20,)), ((0,), (1,), (2,), (99,))])
def test_cuts_of_another_step_are_refused(cuts: Any) -> None:
    with remembered("cut in vain"), pytest.raises(StrategyError, match="are not those of 4 stages"):
        dry_run(gpt(8, 256, 4, sequence=64), Strategy.parse("pp=4"), cuts=cuts)


def test_refusals() -> None:
    with pytest.raises(StrategyError, match="rank 4 of strategy dp=4"):
        dry_run(gpt(2, 64, 2, sequence=64), Strategy(dp=4), 4)
    with pytest.raises(StrategyError, match="batch_size=8 does not divide"):
        dry_run(gpt(2, 64, 2, sequence=64), Strategy(dp=3))
    assert not dist.is_initialized()


class FollowsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * 2 if y.sum() > 0 else y


def branching() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), FollowsData(), nn.Linear(8, 1))


def on_points(model: Any, count: int = 16) -> Workload:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, 4, generator=generator)
    return Workload(
        name="points",
        model=model,
        dataset=TensorDataset(points, points.sum(1, keepdim=True)),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.mse_loss(output, batch[1]),
        optimizer=torch.optim.AdamW,
        batch_size=8,
    )


@pytest.mark.parametrize("spec", ["single", "dp=2", "fsdp=2", "tp=2"])
def test_a_step_that_follows_its_data_runs_with_values(spec: str) -> None:
    run = dry_run(on_points(branching), Strategy.parse(spec))
    assert "with values" in run.notes[-1]
    assert sum(kernel.flops for kernel in run.kernels) > 0
    assert spec == "single" or run.collectives


def test_an_empty_dataset() -> None:
    with pytest.raises(DataError, match="is empty"):
        dry_run(on_points(branching, count=0), Strategy())


def test_memory_of_a_single_worker() -> None:
    """AdamW keeps two numbers for each; gradients are whole when it updates."""
    run = dry_run(on_points(lambda: nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 1))), Strategy())
    elements = 4 * 4096 + 4096 + 4096 + 1
    assert run.memory.parameters == 4 * elements
    assert run.memory.optimizer == 8 * elements + 4 * 4  # and the steps of four tensors
    assert run.memory.total >= 16 * elements


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 16])
def test_parts_of_a_tensor_are_those_of_torch(rows: int, parts: int) -> None:
    tensor = torch.empty(rows, 3, device="meta")
    lazily = _Chunks(tensor, parts, 0)
    from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

    expected = _chunk_with_empty(tensor, parts, dim=0)
    assert [tuple(lazily[i].shape) for i in range(parts)] == [tuple(each.shape) for each in expected]
    assert [lazily[i].storage_offset() for i in range(parts) if lazily[i].numel()] == [
        each.storage_offset() for each in expected if each.numel()
    ]


@pytest.mark.parametrize("workers", [1, 2, 5, 100])
def test_dealing_takes_who_has_least(workers: int) -> None:
    sizes = {f"t{i}": (i * 7919) % 13 for i in range(60)}
    loads, expected = [0] * workers, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        expected[name] = loads.index(min(loads))
        loads[expected[name]] += max(sizes[name], 1)
    assert assign_owners(sizes, workers) == expected
