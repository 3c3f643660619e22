"""Run one training step of one rank of a job of any size in a single process, without hardware or memory.

    run = dry_run(workload, Strategy.parse("dp=128,pp=16,tp=8"), rank=3)
    run.collectives       collectives in order, with groups and bytes
    run.kernels           kernels in order
    run.memory            peak memory by category

The program is the one that trains: `Program` on torch's fake process group. Its parameters, gradients and activations
are tensors without data. `recorder.StepRecorder` observes it, as it does on real workers.
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
from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.mesh import Allocating, random_state_kept
from shardwise.parallel.program import Program
from shardwise.predict.dry_run.fakes import (
    Answers,
    ModelWithoutValues,
    as_on_gpu,
    fake_workers,
    first_share,
)
from shardwise.predict.dry_run.recorder import Event, StepRecord, StepRecorder, collector_off
from shardwise.predict.dry_run.streams import Streams, recorded_streams
from shardwise.predict.prediction import Memory
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.meta_model import builds, widen_grouped_products
from shardwise.splitting.balance import Cuts
from shardwise.strategy import Strategy
from shardwise.workload.data import Share
from shardwise.workload.precision import for_gpu
from shardwise.workload.trace.graph import Untraceable, first_line
from shardwise.workload.workload import Workload

_FOLLOWS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The observed work of one rank in one optimizer step, after optimizer states and buckets exist.

    Attributes:
        strategy: strategy with a definite number of microbatches.
        rank: global rank of the worker.
        record: kernels, collectives and memory.
        cuts: segments at which stages and blocks begin; None if the module ran uncut (tp = pp = 1).
        notes: remarks for the user, one line each.
    """

    strategy: Strategy
    rank: int
    record: StepRecord
    cuts: Cuts | None
    notes: tuple[str, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        """Return kernels and collectives in the order of issue, each with the mark of its part of the step."""
        return self.record.events

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Return the kernels in the order of issue."""
        return self.record.kernels

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Return the collectives in the order of issue."""
        return self.record.collectives

    @property
    def memory(self) -> Memory:
        """Return the bytes at the memory peak of the step, by category."""
        return self.record.memory

    @property
    def flops(self) -> float:
        """Return the FLOPs of this rank, recomputation included."""
        return sum(kernel.flops * kernel.count for kernel in self.kernels)


def dry_run(
    workload: Workload, strategy: Strategy, rank: int = 0, *, cuts: Cuts | None = None, device: str = "cpu"
) -> DryRun:
    """Run one training step of rank `rank` without hardware and without memory for parameters or activations.

    If shapes or branches of the step depend on the values of its data, the step runs with real values, and memory for
    one worker, instead. The notes of the result then say so.

    Args:
        workload: workload to train.
        strategy: strategy to train it under.
        rank: global rank of the worker.
        cuts: cuts of the step, as measured on real workers or chosen by a prediction; None balances costs that are
            counted from FLOPs and bytes.
        device: kind of device, `cpu` or `gpu`. It selects the kernels, and the way in which the optimizer updates its
            parameters: all at once, or one after another.

    Raises:
        StrategyError: The strategy cannot work for this workload, or has no such rank.
        WorkloadError: The model cannot be built or traced.
        DataError: The dataset is empty.
    """
    strategy = strategy.for_batch(workload.batch_size).with_(plain_steps=0)  # a step like all later ones
    if strategy.ps:
        raise StrategyError(f"{strategy}: a dry run starts no parameter servers: predict it without --dry-run")
    if strategy.delayed:
        raise StrategyError(f"{strategy}: a dry run plays steps that end: predict it without --dry-run")
    workload = replace(workload, after_step=None)  # it would be tried on tensors with values
    if not 0 <= rank < strategy.workers:
        raise StrategyError(f"rank {rank} of strategy {strategy}: its workers are 0 to {strategy.workers - 1}")
    with for_gpu(device == "gpu"):
        return _run(workload, strategy, rank, cuts, device)


def _run(workload: Workload, strategy: Strategy, rank: int, cuts: Cuts | None, device: str) -> DryRun:
    why = ""
    for build in _builds(workload):
        try:
            return _SingleDryRun(
                replace(workload, model=build, weights=None), strategy, rank, cuts, device, _without_memory()
            ).result()
        except (Untraceable, *_FOLLOWS_DATA) as error:
            why = first_line(error)
    run = _SingleDryRun(workload, strategy, rank, cuts, device, nullcontext).result()
    return replace(run, notes=(*run.notes, f"run with values, in memory, for it cannot be run without: {why}"))


def _without_memory() -> Allocating:
    """Return a function that gives the fake-tensor mode of a dry run, the same mode at each call."""
    widen_grouped_products()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return lambda: mode


def _builds(workload: Workload) -> Iterator[ModelWithoutValues]:
    """Yield model factories that build the model without values, fastest first."""

    def build(number: int) -> Any:
        return next(islice(builds(workload), number, None)).module

    for number, _ in enumerate(builds(workload)):
        yield ModelWithoutValues(partial(build, number))


@dataclass(frozen=True, slots=True)
class _SingleDryRun:
    """A single dry run; `allocating` gives the mode of tensors without data, or a null context if they have values."""

    workload: Workload
    strategy: Strategy
    rank: int
    cuts: Cuts | None
    device: str
    allocating: Allocating

    def result(self) -> DryRun:
        """Build the program of the rank, run its steps and return what was observed."""
        streams = Streams()
        on_streams = recorded_streams(streams) if self.device == "gpu" else nullcontext()
        with collector_off(), fake_workers(self.rank, self.strategy.workers), random_state_kept(), on_streams:
            program = Program.build(
                self.workload,
                self.strategy,
                device=torch.device("cpu"),
                cuts=self.cuts,
                allocating=self.allocating,
            )
            record = self._recorded(program, streams)
        engine = program.engine
        return DryRun(
            strategy=self.strategy,
            rank=self.rank,
            record=record,
            cuts=engine.division.cuts if isinstance(engine, GraphEngine) else None,
            notes=program.notes,
        )

    def _recorded(self, program: Program, streams: Streams) -> StepRecord:
        """Record one step after a first one, from which optimizer states and the order of buckets come."""
        patched: Any = program
        patched._by_all = lambda _: True  # assume that all ranks leave the same parameters unused
        share = first_share(self.workload, self.strategy, program.mesh.replica, program.engine.uniform, self.allocating)
        first = Share(share.microbatches[:1], share.samples)
        answers = Answers()
        offloaded = self.device == "gpu" and bool(self.strategy.offload)
        device = as_on_gpu(program) if self.device == "gpu" else nullcontext()
        with self.allocating(), answers, device:
            program.step_share(first)
            answers.rebuild_buckets(program.engine)
            if self.strategy.compress:  # errors move to the new buckets once
                program.step_share(first)
            if self.strategy.local:  # the step that is recorded ends with an average
                program.steps = self.strategy.local - 1
            with StepRecorder(offloaded=offloaded, streams=streams) as recorder, recorder.following(program):
                program.step_share(share)
        return recorder.record()
