"""Proof of the first step: before a training begins, its first gradient is compared with that of one worker.

The parallel program computes the gradient of the first samples of the first batch, which replicas join exactly
(uncompressed, where the strategy compresses), and applies nothing; the turns of a
step are all taken, each from the same weights. Worker 0 then
builds the plain module beside it, with the same weights, and computes the gradient of the same samples alone. It also
compares the loss of a few samples with the mean of the losses of their halves, lets the optimizer take a step on the
copy, and evaluates two samples of each held-out dataset, so that what is wrong with a workload is found before the
first step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from shardwise.errors import NotProved, RequestError
from shardwise.launch import watch
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.program import Program
from shardwise.parallel.state.gather import anywhere, gather_full, gather_json
from shardwise.run.training.process_memory import free_memory
from shardwise.run.training.result import FirstStep
from shardwise.run.verification.alone import OneWorker
from shardwise.run.verification.deviation import NO_PROOF, Deviation, deviation, loss_deviation, same_data
from shardwise.run.verification.rounding import rounding
from shardwise.workload.data import Share, cut_batch, is_map_style
from shardwise.workload.reading.draws import drawing_from
from shardwise.workload.reading.loader import Loader

MOST_REPLICAS = 4
"""Largest number of replicas whose samples worker 0 computes alone; of more replicas, the first two are compared."""

COPIES = 4
"""Copies of the weights that worker 0 needs for a proof: its own module and gradient, and both from the workers."""

ROOM = 0.5
"""Share of the free memory that a proof may fill; activations need the rest."""


HALF_LOSS_TOLERANCE = 0.02
"""Relative tolerance between the loss of a batch and the mean of its halves in bf16; one forward pass rounds less."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Findings of worker 0, which all workers receive: errors, a reason for no proof, or a refusal."""

    loss_error: float | None = None
    gradient_error: float | None = None
    reason: str = ""
    refusal: str = ""


def prove_first_step(program: Program, epoch: int = 0, batch: int = 0, loader: Loader | None = None) -> FirstStep:
    """Prove that the first step of a program equals that of one worker. Collective; it changes nothing.

    Args:
        program: program before its first step.
        epoch: epoch of the first batch.
        batch: number of the first batch in its epoch.
        loader: loader of the training; None: the program's, which compares nothing with other workers.

    Raises:
        DataError: the workers read different samples.
        NotProved: the gradient or the loss differs by more than rounding, or the workload's loss, optimizer or
            evaluation is wrong.
    """
    begin = time.perf_counter()
    reason = _unprovable(program)
    with random_state_kept(), drawing_from():
        found = _Found(reason=reason) if reason else _prove(program, loader or program.loader(), epoch, batch)
    watch.beat()
    if found.refusal:
        raise NotProved(found.refusal)
    seconds = time.perf_counter() - begin
    turns = 0 if found.reason else len(program.workload.turns)
    compressed = bool(program.strategy.compress)
    return FirstStep(
        not found.reason, found.loss_error, found.gradient_error, seconds, found.reason or None, turns, compressed
    )


def _unprovable(program: Program) -> str:
    """Return the reason for which worker 0 cannot compute a step alone; an empty string if it can. Collective."""
    dataset, mesh = program.workload.dataset, program.mesh
    if not is_map_style(dataset) and iter(dataset) is dataset:
        return "the dataset can be read only once"
    held = [(held.layout.shape, held.tensor.element_size()) for held in program.engine.held.values()]
    needed = COPIES * sum(math.prod(shape) * size for shape, size in held)
    free = free_memory(mesh.device)
    reason = f"worker 0 would need {needed / 2**30:.1f} GiB beside this run, {free / 2**30:.1f} GiB are free"
    reason = reason if needed > ROOM * free else ""
    return reason if mesh.world is None else str(gather_json(reason, mesh.world, mesh.device)[0])


def _prove(program: Program, loader: Loader, epoch: int, batch: int) -> _Found:
    share = loader.first(epoch, batch)
    if share is None:
        return _Found(reason="there is no batch to train on")
    row = cut_batch(share.samples, loader.parts, loader.microbatches, uniform=loader.uniform)[0]
    few = len(row) <= MOST_REPLICAS or program.workload.whole_batch
    some = row[-1].stop if few else row[1].stop
    found = _compare(program, share, some, epoch, batch)
    if found.refusal and some < row[-1].stop:  # replicas may be coupled, by a batch norm for example
        found = _compare(program, share, row[-1].stop, epoch, batch)
    return found


def _compare(program: Program, share: Share, samples: int, epoch: int, batch: int) -> _Found:
    """Compute the first `samples` samples of a batch in parallel, and on worker 0 also alone. Collective."""
    mesh = program.mesh
    with program.at_means():
        weights = program.full_state_dict()
        with program.tried(share, samples) as value:
            loss = float(value)
            gradients = gather_full(program.gradient_pieces(), mesh.world, mesh.device)
    draws = program.engine.draws_other_random_numbers
    draws = draws if mesh.world is None else anywhere([draws], mesh.world, mesh.device)[0]
    found = _Found()
    if weights is not None and gradients is not None:
        parallel = {name.partition("/")[2]: gradient for name, gradient in gradients.items()}
        try:
            one = _Comparison(program, share, samples, epoch, batch)
            found = one.compare(OneWorker(program, weights), loss, parallel, draws=draws)
        except RequestError as error:
            found = _Found(refusal=str(error))
        except (MemoryError, torch.OutOfMemoryError):
            found = _Found(reason="worker 0 has not enough memory to compute a step alone")
        except Exception as error:  # of the user's functions, on other numbers of samples than they are trained with
            found = _Found(reason=f"worker 0 cannot compute a step alone: {type(error).__name__}: {error}")
    return found if mesh.world is None else _Found(**gather_json(asdict(found), mesh.world, mesh.device)[0])


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Comparison of the first samples of a batch with one worker, on worker 0."""

    program: Program
    share: Share
    samples: int
    epoch: int
    batch: int

    def compare(self, alone: OneWorker, loss: float, gradients: Mapping[str, Tensor], *, draws: bool) -> _Found:
        """Compare the parallel loss and gradients with those of `alone`, and try its other functions.

        Args:
            alone: plain module with the weights of the program.
            loss: loss of the program.
            gradients: full gradients of the program by name.
            draws: whether the program drew random numbers that workers do not share.

        Raises:
            WorkloadError: see `OneWorker`.
        """
        whole = self._shares()
        # before a pass, which may write into its batch
        repeatable = all(same_data(*pair) for pair in zip(whole, self._shares(), strict=True))
        value, expected = alone.loss_and_gradients(whole)
        alone.update()
        alone.evaluate()
        if draws or alone.draws():
            return _Found(reason="the model draws random numbers that no two workers share")
        if not repeatable:
            return _Found(reason="the dataset gives other samples each time it is read")
        if refusal := self._coupled(alone):
            return _Found(refusal=refusal)
        return self._judged(loss_deviation(loss, value, "the batch"), deviation(gradients, expected))

    def _judged(self, loss: Deviation, gradient: Deviation) -> _Found:
        tolerance = self._tolerance()
        if not (math.isfinite(loss.error) and math.isfinite(gradient.error)) and NO_PROOF in loss.why:
            return _Found(reason=f"the loss {loss.why}")
        for kind, found in (("the loss of", loss), ("the gradient of", gradient)):
            if not found.error <= tolerance:
                differs = found.why or f"differs by {found.error:.1e}, rounding explains {tolerance:.1e}"
                return _Found(
                    refusal=f"the first step under {self.program.strategy} is not that of one process: {kind} "
                    f"{found.tensor} {differs}: choose another strategy (shardwise verify tells which axes hold), or "
                    "train all the same with --no-proof"
                )
        return _Found(loss.error, gradient.error)

    def _coupled(self, alone: OneWorker) -> str:
        """Return one line if the loss of a few samples is not the mean of the losses of their halves, else nothing.

        Microbatches and replicas train on the mean of their losses, which must then be the loss of the batch.
        """
        strategy = self.program.strategy
        count = min(max(self.samples, 4), self.share.samples)  # halves of one sample are special to some models
        if count < 2 or strategy.replicas * strategy.microbatches == 1 or self.program.workload.whole_batch:
            return ""
        whole, halves = (alone.mean_loss(self._read(count, cells)) for cells in (1, 2))
        if whole is None or halves is None or not math.isfinite(whole):
            return ""
        half = strategy.in_bf16(self.program.workload.precision)
        error = loss_deviation(halves, whole, "").error
        if error <= (HALF_LOSS_TOLERANCE if half else self._tolerance()):
            return ""
        return (
            f"the loss of workload {self.program.workload.name!r} is no mean over samples: it is {whole:.6g} for the "
            f"first {count} samples, but the mean of their halves is {halves:.6g}, and {strategy} trains on the "
            "mean of parts: give `weight` if the loss averages over something else (tokens that are not padding), "
            "or whole_batch=True if it couples the samples of a batch"
        )

    def _tolerance(self) -> float:
        dtypes = {parameter.dtype for parameter in self.program.engine.parameters.values()}
        return rounding(self.program, self.share, float64=dtypes == {torch.float64})

    def _shares(self) -> list[Share]:
        """Read the samples again, as the passes of one worker: one, or one for each replica that takes local steps.

        A batch norm sees those of one replica at a time.
        """
        strategy = self.program.strategy
        if not strategy.local:
            return [self._read(self.samples, 1)]
        row = cut_batch(self.share.samples, strategy.parts, strategy.microbatches, uniform=self.program.engine.uniform)[
            0
        ]
        ends = [row[number].stop for number in range(strategy.fsdp - 1, strategy.replicas, strategy.fsdp)]
        sizes = [min(end, self.samples) - start for start, end in pairwise([0, *ends])]
        sizes = [size for size in sizes if size > 0]
        return [self._read(self.samples, 1, number, sizes) for number in range(len(sizes))]

    def _read(self, samples: int, cells: int, part: int = 0, parts: Sequence[int] = (1,)) -> Share:
        """Read the first samples of the batch again, collated into so many microbatches of one worker.

        Only part `part` of them in the proportion `parts` is read.
        """
        whole: Loader = replace(
            self.program.loader(), replica=part, parts=tuple(parts), microbatches=cells, uniform=False, limit=samples
        )
        share = whole.first(self.epoch, self.batch)
        assert share is not None
        return share
