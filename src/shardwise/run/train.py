"""The training loop, read top to bottom. What is written and measured beside it is in `run.record`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardwise.errors import CheckpointError, DataError, NotFinite
from shardwise.parallel.program import Program
from shardwise.run.agreement import Agreement
from shardwise.run.job import Job
from shardwise.run.jsonfile import short
from shardwise.run.record import Record
from shardwise.run.restored import unlike
from shardwise.run.result import Trained
from shardwise.run.streams import StreamAgreement
from shardwise.workload.data import Loader, is_map_style


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: `batch` of `epoch` is the next. Travels with checkpoints.

    `batch_size` and `seed` say which samples that batch has; `loss` (of the last step) and `metrics` (of the last
    evaluation) are the last known. `evaluated` is the step of that evaluation, -1 where there was none. `finite` says
    whether weights and loss were, `skipped_steps` how many updates were not applied.
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
"""What checkpoints of earlier versions do not have."""


def train(program: Program, job: Job) -> Trained:
    """Trains until the steps or epochs that `job` asks for are done. Collective; all workers must see the run's folder.

    Raises:
        DataError: the dataset is empty, or not the same on all workers.
        CheckpointError: the run cannot be resumed from its checkpoint.
        NotFinite: loss or gradient of a step are not, and the options say to stop.
    """
    options = job.options
    record, agreement = Record(program, job), Agreement()
    progress = _start(record, program, resume=options.resume)
    loader = _agreeing(program)
    total = options.total(loader.batches)
    with record.open(total), _left_finite(record, lambda: progress):
        while not _done(program.steps, total) and not _done(progress.epoch, options.epochs):
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
                progress = _next_epoch(progress)
            loss = record.loss()
            progress = _evaluated(record, program, progress if loss is None else replace(progress, loss=loss))
            if not options.checkpoint_every:
                record.save(asdict(progress))
        progress = _evaluated(record, program, progress)  # an evaluation that a kill cut short is still to be made
        record.save(asdict(progress))
        return record.close(progress.loss, progress.metrics)


def _agreeing(program: Program) -> Loader:
    """The loader of the training data; workers agree on each batch of a stream."""
    loader = program.loader()
    if is_map_style(loader.dataset) or program.mesh.world is None:
        return loader
    return replace(loader, agree=StreamAgreement(program.steps + 1))


def _start(record: Record, program: Program, *, resume: bool) -> Progress:
    """Where the newest checkpoint left off; the beginning where there is none."""
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
    """The progress in a checkpoint, where every value is of its kind; earlier ones do not say what was evaluated.

    Raises:
        CheckpointError: it is not what `train` gave.
    """
    problem = _progress_problem(asdict(fresh), saved)
    if problem:
        raise CheckpointError(f"the checkpoint of step {steps} is damaged: {problem}")
    ended = not saved.get("batch")  # it was written after the evaluation at the end of an epoch
    return replace(fresh, **{"evaluated": steps if ended else -1, **saved})


def _progress_problem(known: dict[str, Any], saved: dict[str, Any]) -> str:
    """One line on the first value of a saved progress that is none; empty where all are as they should be."""
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


def _evaluated(record: Record, program: Program, progress: Progress) -> Progress:
    """The progress with an evaluation after its last step."""
    if progress.evaluated == program.steps or program.steps == 0:
        return progress
    return replace(progress, metrics=record.evaluate(progress.epoch), evaluated=program.steps)


@contextmanager
def _left_finite(record: Record, progress: Callable[[], Progress]) -> Iterator[None]:
    """Leaves what was before a step that is not finite as a checkpoint, and says from where to go on."""
    try:
        yield
    except NotFinite as error:
        record.save_finite(asdict(replace(progress(), loss=record.loss())))
        raise NotFinite(f"{error}; {record.way_on()}") from None


def _done(count: int, wanted: int | None) -> bool:
    """Whether as much is done as is wanted (None: no end), or more: a run can be resumed with less than it has."""
    return wanted is not None and count >= wanted


def _next_epoch(progress: Progress) -> Progress:
    if progress.batch == 0:
        raise DataError("the dataset gave no sample: there is nothing to train on")
    return replace(progress, epoch=progress.epoch + 1, batch=0)
