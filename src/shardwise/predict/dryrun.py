"""Runs one step of the real program of one worker among any number, on workers and tensors that are not there.

    run = dry_run(workload, Strategy.parse("dp=128,pp=16,tp=8"), rank=3)
    run.collectives       what it sends, in order, with groups and bytes
    run.kernels           what it computes
    run.memory            at its peak, by what it is for

The program is the one that trains: `Program` on torch's fake process group, its parameters, gradients and activations
tensors without data. What it does is observed by `record.Recorder`, as on real workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from shardwise.collective import Collective
from shardwise.errors import StrategyError
from shardwise.parallel.mesh import Allocating
from shardwise.parallel.planning import Cuts
from shardwise.parallel.program import Program
from shardwise.parallel.staged import GraphEngine
from shardwise.predict.fakes import Answers, ModelWithoutValues, as_on_gpu, fake_workers, first_share, replicated
from shardwise.predict.grouped import widen_grouped_products
from shardwise.predict.kernel import Kernel
from shardwise.predict.models import builds
from shardwise.predict.prediction import Memory
from shardwise.predict.record import Event, Record, Recorder
from shardwise.strategy import Strategy
from shardwise.workload.data import Share
from shardwise.workload.graph import Untraceable, first_line
from shardwise.workload.workload import Workload

_FOLLOWS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What one worker does in one optimizer step, after the first.

    Attributes:
        strategy: with the number of microbatches settled.
        rank: of the worker.
        record: kernels, collectives and memory.
        cuts: into stages and blocks; None where the module ran as it is.
        notes: what a person should know, one line each.
    """

    strategy: Strategy
    rank: int
    record: Record
    cuts: Cuts | None
    notes: tuple[str, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        """Kernels and collectives in the order in which they are issued, with their place in the step."""
        return self.record.events

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """In order."""
        return self.record.kernels

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """In order."""
        return self.record.collectives

    @property
    def memory(self) -> Memory:
        """Peak bytes."""
        return self.record.memory

    @property
    def flops(self) -> float:
        """Floating point operations, recomputation included."""
        return sum(kernel.flops * kernel.count for kernel in self.kernels)


def dry_run(
    workload: Workload, strategy: Strategy, rank: int = 0, *, cuts: Cuts | None = None, device: str = "cpu"
) -> DryRun:
    """Runs the step of worker `rank` of the job that trains `workload` under `strategy`.

    Takes no memory for parameters or activations, and no hardware. A step whose shapes or branches follow the values of
    its data is run with values instead, as one real worker computes it; the notes then say so.

    Args:
        workload: what is trained.
        strategy: how it is split.
        rank: which worker.
        cuts: of the step, as a program on real workers measured them or a prediction wants them; None: as costs,
            counted from FLOPs and bytes, say.
        device: kind of device, `cpu` or `gpu`: which kernels run, and how the optimizer takes its parameters.

    Raises:
        StrategyError: the strategy cannot work for this workload, or has no such worker.
        WorkloadError: the model cannot be built or traced.
        DataError: the dataset is empty.
    """
    strategy = strategy.for_batch(workload.batch_size)
    if not 0 <= rank < strategy.workers:
        raise StrategyError(f"rank {rank} of strategy {strategy}: its workers are 0 to {strategy.workers - 1}")
    why = ""
    for build in _builds(workload):
        try:
            return _Run(replace(workload, model=build), strategy, rank, cuts, device, _without_memory()).result()
        except (Untraceable, *_FOLLOWS_DATA) as error:
            why = first_line(error)
    run = _Run(workload, strategy, rank, cuts, device, nullcontext).result()
    return replace(run, notes=(*run.notes, f"run with values, in memory, for it cannot be run without: {why}"))


def _without_memory() -> Allocating:
    """What gives tensors without data, always of one kind."""
    widen_grouped_products()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return lambda: mode


def _builds(workload: Workload) -> Iterator[ModelWithoutValues]:
    """The ways in which the model can be built without values, the quickest first."""

    def build(number: int) -> Any:
        return next(islice(builds(workload), number, None)).module

    for number, _ in enumerate(builds(workload)):
        yield ModelWithoutValues(partial(build, number))


@dataclass(frozen=True, slots=True)
class _Run:
    """One dry run; `allocating` gives the mode of tensors without data, or nothing where they have values."""

    workload: Workload
    strategy: Strategy
    rank: int
    cuts: Cuts | None
    device: str
    allocating: Allocating

    def result(self) -> DryRun:
        """Builds the program and runs it."""
        with fake_workers(self.rank, self.strategy.workers), torch.random.fork_rng():
            program = Program.build(
                self.workload,
                self.strategy,
                device=torch.device("cpu"),
                cuts=self.cuts,
                allocating=self.allocating,
            )
            record = self._recorded(program)
        engine = program.engine
        return DryRun(
            strategy=self.strategy,
            rank=self.rank,
            record=record,
            cuts=engine.division.cuts if isinstance(engine, GraphEngine) else None,
            notes=tuple(engine.notes),
        )

    def _recorded(self, program: Program) -> Record:
        """A step, after others in which states of the optimizer and buckets are made."""
        patched: Any = program
        patched._by_all = lambda _: True  # others leave the same parameters unused
        share = first_share(self.workload, self.strategy, program.mesh.replica, program.engine.uniform, self.allocating)
        first = Share(share.microbatches[:1], share.samples)
        answers = Answers()
        offloaded = self.device == "gpu" and bool(self.strategy.offload)
        device = as_on_gpu(program) if self.device == "gpu" else nullcontext()
        with self.allocating(), answers, answers.following(program.engine), device:
            for _ in range(_first_steps(program)):
                program.step_share(first)
            with Recorder(offloaded=offloaded) as recorder, recorder.following(program):
                program.step_share(share)
        return recorder.record()


def _first_steps(program: Program) -> int:
    """Steps until the next ones are like each other: DDP orders its buckets anew when the second begins."""
    return 2 if replicated(program.engine) is not None else 1
