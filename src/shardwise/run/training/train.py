"""Training loop, to be read from top to bottom; `run.training.record` writes and measures around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardwise.errors import CheckpointError, DataError, NotFinite
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.restored import unlike
from shardwise.run.jsonfile import short
from shardwise.run.training.agreement import Agreement
from shardwise.run.training.job import Job
from shardwise.run.training.process_memory import forget_peak
from shardwise.run.training.record import RunRecord
from shardwise.run.training.result import FirstStep, Trained
from shardwise.run.training.streams import StreamAgreement, agreeing
from shardwise.run.verification.first_step import prove_first_step


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a training, which is saved in checkpoints.

    Attributes:
        batch_size: global batch size, which decides the samples of each batch together with `seed`.
        seed: seed of the data order.
        epoch: epoch of the next batch.
        batch: number of the next batch in its epoch.
        loss: loss of the last step; None if it is not known.
        metrics: values of the last evaluation.
        evaluated: step of the last evaluation; -1 if there was none.
        finite: True if weights and loss were finite.
        skipped_steps: number of steps whose update was not applied.
    """

    batch_size: int
    seed: int
    epoch: int = 0
    batch: int = 0
    loss: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluated: int = -1
    finite: bool = True
    skipped_steps: int = 0


LATER_FIELDS = {"evaluated", "finite", "skipped_steps"}
"""Fields that checkpoints of earlier versions lack."""


def train(program: Program, job: Job) -> Trained:
    """Train until the steps or epochs of `job` are done. Collective; all workers must see the run's folder.

    Raises:
        DataError: the dataset is empty, or differs between workers.
        CheckpointError: the run cannot be resumed from its checkpoint.
        NotFinite: the loss or gradient of a step is not finite, and the policy of `job` is to stop.
        NotProved: the first step is not that of one process.
    """
    options = job.options
    record, agreement = RunRecord(program, job), Agreement()
    progress = _start(record, program, resume=options.resume)
    loader = agreeing(program)
    # a sampler may give another number of batches in each epoch
    total = options.total(loader.batches) if loader.loading.chooser is None else options.steps
    if not options.proof:
        record.first_step = FirstStep(False, reason="left out, as asked for")
    elif not _done(program.steps, total) and not _done(progress.epoch, options.epochs):
        record.first_step = prove_first_step(program, progress.epoch, progress.batch, loader)
        if isinstance(loader.agree, StreamAgreement):
            loader.agree.begin(program.steps + 1)
        forget_peak(program.mesh.device)
    with record.open(options.total(loader.batches), loader.notes), _left_finite(record, lambda: progress):
        while not _done(program.steps, total) and not _done(progress.epoch, options.epochs):
            ended = False
            for share in loader.shares(progress.epoch, progress.batch):
                with record.step(progress.epoch, share.samples) as step:
                    step.loss = program.step_share(share)
                progress = replace(progress, batch=progress.batch + 1)
                if signal := agreement.stop():
                    record.save(asdict(replace(progress, loss=record.loss())))
                    return record.close(record.loss(), progress.metrics, signal)
                if _done(program.steps, total):
                    break
                if options.checkpoint_every and program.steps % options.checkpoint_every == 0:
                    record.save(asdict(replace(progress, loss=record.loss())))
            else:
                progress, ended = _next_epoch(progress), True
            loss = record.loss()
            progress = _evaluated(record, program, progress if loss is None else replace(progress, loss=loss))
            if ended:
                program.next_epoch(progress.metrics)
            if not options.checkpoint_every:
                record.save(asdict(progress))
        progress = _evaluated(record, program, progress)  # makes up for an evaluation that a kill interrupted
        record.save(asdict(progress))
        return record.close(progress.loss, progress.metrics)


def _start(record: RunRecord, program: Program, *, resume: bool) -> Progress:
    """Return the progress to start from: that of the newest checkpoint if the run is resumed, else the beginning.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another batch size or seed within an epoch.
    """
    fresh = Progress(program.workload.batch_size, program.workload.seed)
    saved = record.load() if resume else None
    if saved is None:
        return fresh
    progress = restored(saved, fresh, program.steps)
    for name in ("batch_size", "seed") if progress.batch else ():
        before, now = getattr(progress, name), getattr(fresh, name)
        if before != now:
            raise CheckpointError(
                f"the run stopped within an epoch with {name}={before}: resume it with that, not {now}"
            )
    return replace(progress, batch_size=fresh.batch_size, seed=fresh.seed)


def restored(saved: dict[str, Any], fresh: Progress, steps: int) -> Progress:
    """Return the progress in a checkpoint after a check of its values; fields of LATER_FIELDS may be missing.

    Raises:
        CheckpointError: the progress is not such as `train` saves.
    """
    problem = _progress_problem(asdict(fresh), saved)
    if problem:
        raise CheckpointError(f"the checkpoint of step {steps} is damaged: {problem}")
    ended = not saved.get("batch")  # the checkpoint was written after the evaluation at the end of an epoch
    return replace(fresh, **{"evaluated": steps if ended else -1, **saved})


def _progress_problem(known: dict[str, Any], saved: dict[str, Any]) -> str:
    """Return one line on the first invalid value of a saved progress. Returns an empty string if all are valid."""
    if odd := sorted((saved.keys() ^ known.keys()) - LATER_FIELDS):
        return f"progress has {short(odd[0])}" if odd[0] in saved else f"progress has no {odd[0]}"
    numbers = {"loss": saved["loss"], **(saved["metrics"] if isinstance(saved["metrics"], dict) else {})}
    for name, value in numbers.items():
        if value is not None and type(value) not in (int, float):
            return f"{short(name)} is {short(value)}"
    for name in ("epoch", "batch"):
        if type(saved[name]) is not int or saved[name] < 0:
            return f"{name} is {short(saved[name])}"
    return unlike(known, saved, "progress")


def _evaluated(record: RunRecord, program: Program, progress: Progress) -> Progress:
    """Evaluate unless the last step was evaluated already, and return the progress with the values."""
    if progress.evaluated == program.steps or program.steps == 0:
        return progress
    return replace(progress, metrics=record.evaluate(progress.epoch), evaluated=program.steps)


@contextmanager
def _left_finite(record: RunRecord, progress: Callable[[], Progress]) -> Iterator[None]:
    """Save the state before a step that is not finite as a checkpoint, and add advice on resuming to the error."""
    try:
        yield
    except NotFinite as error:
        record.save_finite(asdict(replace(progress(), loss=record.loss())))
        raise NotFinite(f"{error}; {record.way_on()}") from None


def _done(count: int, wanted: int | None) -> bool:
    """Return whether `count` reaches `wanted` (None: no limit).

    It may exceed `wanted`: a run can be resumed with fewer steps than it has.
    """
    return wanted is not None and count >= wanted


def _next_epoch(progress: Progress) -> Progress:
    if progress.batch == 0:
        raise DataError("the dataset gave no sample: there is nothing to train on")
    return replace(progress, epoch=progress.epoch + 1, batch=0)
