"""The dry run of a job says what its real workers do: the same collectives, byte for byte, and the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from models import ODDITIES, WORKLOADS
from pool import Pools, use_backend
from torch.utils.data import Subset
from traces import remembered

from shardwise.collective import Collective
from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.optim import zero1
from shardwise.parallel.pipeline.executor import PipelineExecutor
from shardwise.parallel.tensor import communication
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.predict.prediction import Memory
from shardwise.predict.profile.kernel import Kernel
from shardwise.splitting import buckets
from shardwise.splitting.balance import Cuts
from shardwise.strategy import Strategy
from shardwise.workload.recipes.image import image
from shardwise.workload.recipes.language import language
from shardwise.workload.recipes.medical import medical
from shardwise.workload.workload import Workload

Factory = Callable[[], Workload]
MEMORY_TOLERANCE = 0.05
STEPS = 2
"""Number of measured steps: in some of them a thread that communicates may hold a tensor a moment longer."""


def small_language(dropout: float = 0.0) -> Workload:
    """A few samples of a million, of which the order would have to be drawn."""
    workload = language(sequence=32, layers=2, hidden=64, batch_size=16, tied=True, dropout=dropout)
    return replace(workload, dataset=Subset(workload.dataset, range(64)))


def small_image() -> Workload:
    return image(layers=3, hidden=32, heads=4, batch_size=16)


def small_medical() -> Workload:
    return medical(channels=4, batch_size=4, patch=16, norm="batch")


ALL: dict[str, Factory] = {
    **WORKLOADS,
    **ODDITIES,
    "language": small_language,
    "dropping": partial(small_language, 0.1),
    "image": small_image,
    "medical": small_medical,
}


@dataclass(frozen=True)
class Observed:
    """Record of one real worker's step."""

    collectives: tuple[Collective, ...]
    kernels: list[Kernel]
    memory: Memory
    cuts: Cuts | None


def observed(factory: Factory, strategy: str, ranks: range) -> Observed | None:
    """Take some steps on a real worker, and record the last ones if its rank is one of `ranks`."""
    from shardwise.parallel.program import Program
    from shardwise.predict.dry_run.recorder import StepRecorder

    if dist.is_initialized():
        use_backend("gloo")  # whose operations a dispatch mode sees
    with remembered(factory):
        program = Program.build(factory(), Strategy.parse(strategy))
    share = next(program.loader().shares(0))
    for _ in range(2):
        program.step_share(share)
    if program.mesh.rank not in ranks:
        for _ in range(STEPS):
            program.step_share(share)
        return None
    records = []
    for _ in range(STEPS):
        with StepRecorder() as recorder, recorder.following(program):
            program.step_share(share)
        records.append(recorder.record())
    assert len({record.collectives for record in records}) == 1
    least = min((record.memory for record in records), key=lambda memory: memory.total)
    cuts = program.engine.division.cuts if isinstance(program.engine, GraphEngine) else None
    return Observed(records[0].collectives, multiplied(records[0].kernels), least, cuts)


def multiplied(kernels: tuple[Kernel, ...]) -> list[Kernel]:
    """Return the kernels that compute; moves may differ, as a collective of gloo copies its results."""
    return [kernel for kernel in kernels if kernel.kind != "memory"]


def compare(real: Observed, dry: DryRun) -> None:
    """Fails where a dry run is not what a real worker did."""
    assert dry.collectives == real.collectives
    assert multiplied(dry.kernels) == real.kernels
    for ours, theirs in zip(stays_and_passes(dry.memory), stays_and_passes(real.memory), strict=True):
        assert abs(ours - theirs) <= MEMORY_TOLERANCE * real.memory.total, (dry.memory, real.memory)
    assert dry.memory.total == pytest.approx(real.memory.total, rel=MEMORY_TOLERANCE)


def stays_and_passes(memory: Memory) -> tuple[int, int, int]:
    """Split memory into parts that have one size all through a step, and the rest together.

    Of two moments that need about as much, a run may have its peak in one and a dry run in the other, with more
    gradients and less activations.
    """
    return memory.parameters, memory.optimizer, memory.gradients + memory.activations + memory.temporary


_OBSERVED: dict[tuple[str, str], list[Observed | None]] = {}
"""Steps of real workers, which what is broken in this process does not change."""


def check(workers: Pools, name: str, strategy: str, ranks: slice = slice(0, None, 3)) -> None:
    """Compares workers with their dry runs, which are cut where the real step was: costs are measured each time."""
    parsed = Strategy.parse(strategy)
    if (name, strategy) not in _OBSERVED:
        recorded = range(0, parsed.workers, 3)
        _OBSERVED[name, strategy] = workers(parsed.workers, observed, ALL[name], strategy, recorded)
    for rank in range(parsed.workers)[ranks]:
        real = _OBSERVED[name, strategy][rank]
        assert real is not None
        with remembered(ALL[name]):
            dry = dry_run(ALL[name](), parsed, rank, cuts=real.cuts)
        assert not any("run with values" in note for note in dry.notes), dry.notes
        compare(real, dry)


AXES = (
    "single,microbatches=2,recompute=full",
    "dp=2",
    "fsdp=2",
    "fsdp=2,microbatches=2,recompute=full",
    "fsdp=2,recompute=1/2",
    "dp=2,microbatches=2,recompute=selective",
    "pp=2,recompute=selective",
    "fsdp=2,zero=1",
    "tp=2,sp=1",
    "pp=2,schedule=gpipe,recompute=full",
    "pp=2,schedule=interleaved",
    "pp=2,schedule=interleaved,recompute=1/2",
    "pp=2,schedule=zero-bubble",
    "dp=2,precision=bf16",
    "tp=2,precision=bf16",
)
PRODUCTS = (
    "dp=2,fsdp=2",
    "dp=2,tp=2",
    "dp=2,pp=2,schedule=zero-bubble",
    "tp=2,pp=2,sp=1,schedule=interleaved",
    "fsdp=2,tp=2,zero=2",
    "fsdp=2,pp=2,zero=1",
    "fsdp=2,pp=2,outermost=pp",
    "dp=2,pp=2,speeds=3:1",
    "fsdp=2,pp=2,schedule=zero-bubble,recompute=full",
    "fsdp=2,tp=2,sp=1,recompute=1/3",
    "fsdp=2,tp=2,recompute=selective",
    "pp=4",
)


@pytest.mark.parametrize("strategy", AXES + PRODUCTS)
def test_every_strategy(workers: Pools, strategy: str) -> None:
    check(workers, "language", strategy)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("dropping", "dp=2"),
        ("dropping", "fsdp=2,tp=2,sp=1,recompute=full"),
        ("dropping", "pp=2,recompute=full"),
        ("dropping", "fsdp=2,tp=2,sp=1,recompute=selective"),
        ("unet", "fsdp=2,recompute=selective"),
        ("medical", "dp=2"),
        ("medical", "fsdp=2,pp=2"),
        ("resnet", "dp=2,microbatches=2"),
        ("unet", "pp=2,schedule=interleaved"),
        ("perceptron", "dp=2"),  # has a parameter that is never used
        ("perceptron", "fsdp=2,tp=2"),
        ("smoothed", "dp=2,pp=2"),  # has a weight of its own
        ("first-token", "tp=2"),
        ("shared", "pp=2"),
        ("translator", "tp=2"),
    ],
)
def test_other_models(workers: Pools, name: str, strategy: str) -> None:
    check(workers, name, strategy)


# ---- broken on purpose ----------------------------------------------------------------------------------------------


def without_every_third(owner: Any, name: str) -> Any:
    """Leaves out some calls of a function."""
    original, count = getattr(owner, name), 0

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return mock.MagicMock() if count % 3 == 0 else original(*args, **kwargs)

    return mock.patch.object(owner, name, sometimes)


@pytest.mark.parametrize(
    ("strategy", "owner", "name"),
    [
        ("tp=2", communication.Exchange, "_all_reduce"),
        ("tp=2,sp=1", communication.Exchange, "_all_gather"),
        ("dp=2,pp=2", PipelineExecutor, "_send"),
        ("dp=2,tp=2", dist, "all_reduce"),
        ("fsdp=2,zero=1", zero1, "broadcast"),
    ],
)
def test_a_missing_exchange_is_noticed(workers: Pools, strategy: str, owner: Any, name: str) -> None:
    with without_every_third(owner, name), pytest.raises(AssertionError):
        check(workers, "language", strategy, slice(1))


def test_other_bytes_are_noticed(workers: Pools) -> None:
    with mock.patch.object(buckets, "BUCKET_BYTES", 2**10), pytest.raises(AssertionError):
        check(workers, "language", "dp=2,tp=2", slice(1))


def test_a_worker_cannot_run_dry(workers: Pools) -> None:
    def attempt() -> str:
        assert dist.is_initialized()
        try:
            dry_run(ALL["language"](), Strategy(dp=2))
        except RuntimeError as error:
            return str(error)
        return ""

    assert all("process group" in message for message in workers(2, attempt))
