"""Training loop, to be read from top to bottom; `run.training.record` writes and measures around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from shardwise.errors import CheckpointError, DataError, NotFinite
from shardwise.launch import regroup
from shardwise.parallel.program import Program
from shardwise.run.training.agreement import Agreement
from shardwise.run.training.job import Job
from shardwise.run.training.join_point import JoinPoint
from shardwise.run.training.process_memory import forget_peak
from shardwise.run.training.progress import Progress, restored
from shardwise.run.training.record import RunRecord
from shardwise.run.training.result import FirstStep, Trained
from shardwise.run.training.streams import StreamAgreement, agreeing
from shardwise.run.verification.first_step import prove_first_step
from shardwise.workload.reading.loader import Loader


def train(program: Program, job: Job, join_point: JoinPoint | None = None) -> Trained:
    """Train until the steps or epochs of `job` are done. Collective; all workers must see the run's folder.

    `join_point` is noted after each step, and is where the training goes on once a killed worker was started again.

    Raises:
        DataError: the dataset is empty, or differs between workers.
        CheckpointError: the run cannot be resumed from its checkpoint.
        NotFinite: the loss or gradient of a step is not finite, and the policy of `job` is to stop.
        NotProved: the first step is not that of one process.
    """
    options = job.options
    record, agreement = RunRecord(program, job, join_point=join_point or JoinPoint()), Agreement()
    progress = _begun(record, program, resume=options.resume)
    loader = agreeing(program)
    # a sampler may give another number of batches in each epoch
    total = options.total(loader.batches) if loader.loading.chooser is None else options.steps

    def over() -> bool:
        enough = _done(program.steps, total) or _done(progress.epoch, options.epochs)
        return enough or progress.stopped(program.workload)

    if regroup.generation():
        record.first_step = record.join_point.first_step
    elif not options.proof:
        record.first_step = FirstStep(False, reason="left out, as asked for")
    elif not over():
        record.first_step = _proved(program, progress, loader)
    with record.open(options.total(loader.batches), loader.notes), _left_finite(record, lambda: progress):
        record.offer(progress, loader.batches)
        progress = _evaluated(record, program, progress)  # makes up for evaluations that a kill interrupted
        while not over():
            ended = False
            for share in loader.shares(progress.epoch, progress.batch):
                with record.step(progress.epoch, share.samples) as step:
                    step.loss = program.step_share(share)
                progress = replace(progress, batch=progress.batch + 1)
                record.note_join_point(progress)
                regroup.check()
                if signal := program.told_to_stop() if program.strategy.stale else agreement.stop():
                    progress = replace(progress, loss=record.loss())
                    record.save(asdict(progress))
                    return record.close(progress, signal)
                progress = _evaluated(record, program, progress)
                if _done(program.steps, total) or progress.stopped(program.workload):
                    break
                if options.checkpoint_every and program.steps % options.checkpoint_every == 0:
                    record.save(asdict(replace(progress, loss=record.loss())))
            else:
                progress, ended = _next_epoch(progress), True
            progress = _evaluated(record, program, progress, ended=ended, last=over())
            if not options.checkpoint_every:
                record.save(asdict(progress))
            record.note_join_point(progress)
        progress = _evaluated(record, program, progress, last=True)
        record.save(asdict(progress))
        return record.close(progress)


def _proved(program: Program, progress: Progress, loader: Loader) -> FirstStep:
    """Prove the first step to come, and put back what the proof has read and used."""
    found = prove_first_step(program, progress.epoch, progress.batch, loader)
    if isinstance(loader.agree, StreamAgreement):
        loader.agree.begin(program.steps + 1)
    forget_peak(program.mesh.device)
    return found


def _begun(record: RunRecord, program: Program, *, resume: bool) -> Progress:
    """Return the progress to start from: where the others are, if a killed worker was started again, else `_start`."""
    record.join_point.begin(program)
    if not regroup.generation():
        return _start(record, program, resume=resume)
    progress = record.join_point.take(program)
    record.go_on()
    return progress


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


def _evaluated(
    record: RunRecord, program: Program, progress: Progress, *, ended: bool = False, last: bool = False
) -> Progress:
    """Make the evaluations that are due, and return the progress with their values; a new best is saved.

    An epoch that has `ended` moves the schedule before anything is saved. The loss is noted whenever training pauses.
    """
    workload, step = program.workload, program.steps
    numbers = progress.due(workload, step, epoch_ends=ended, last=last)
    if numbers or ended or last:
        loss = record.loss()
        progress = progress if loss is None else replace(progress, loss=loss)
    if numbers:
        values = record.evaluate(progress.epoch, numbers)
        progress = progress.with_values(workload, numbers, step, values)
    if ended:
        program.next_epoch(progress.metrics)
    if numbers and progress.best.get("step") == step:
        record.save(asdict(progress))
    return progress


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
