"""The training loop, read top to bottom. What is written and measured beside it is in `run.record`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardwise.errors import CheckpointError, DataError, NotFinite
from shardwise.parallel.program import Program
from shardwise.run.job import Job
from shardwise.run.record import Record
from shardwise.run.result import Trained
from shardwise.run.streams import StreamAgreement
from shardwise.workload.data import Loader, is_map_style


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: `batch` of `epoch` is the next. Travels with checkpoints.

    `batch_size` and `seed` say which samples that batch has; `loss` (of the last step) and `metrics` (of the last
    evaluation) are the last known. `finite` says whether weights and loss were, `skipped_steps` how many updates were
    not applied.
    """

    batch_size: int
    seed: int
    epoch: int = 0
    batch: int = 0
    loss: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    finite: bool = True
    skipped_steps: int = 0


def train(program: Program, job: Job) -> Trained:
    """Trains until the steps or epochs that `job` asks for are done. Collective; all workers must see the run's folder.

    Raises:
        DataError: the dataset is empty, or not the same on all workers.
        CheckpointError: the run cannot be resumed from its checkpoint.
        NotFinite: loss or gradient of a step are not, and the options say to stop.
    """
    options = job.options
    record = Record(program, job)
    progress = _start(record, program, resume=options.resume)
    loader = _agreeing(program)
    total = options.total(loader.batches)
    with record.open(total), _left_finite(record, lambda: progress):
        while not _done(program.steps, total) and not _done(progress.epoch, options.epochs):
            for share in loader.shares(progress.epoch, progress.batch):
                with record.step(progress.epoch, share.samples) as step:
                    step.loss = program.step_share(share)
                progress = replace(progress, batch=progress.batch + 1)
                if _done(program.steps, total):
                    break
                if options.checkpoint_every and program.steps % options.checkpoint_every == 0:
                    record.save(asdict(replace(progress, loss=record.loss())))
            else:
                progress = _next_epoch(progress)
            progress = replace(progress, loss=record.loss(), metrics=record.evaluate(progress.epoch, progress.metrics))
            if not options.checkpoint_every:
                record.save(asdict(progress))
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
    progress = Progress(**saved)
    for name in ("batch_size", "seed") if progress.batch else ():
        before, now = getattr(progress, name), getattr(fresh, name)
        if before != now:
            raise CheckpointError(
                f"the run stopped within an epoch with {name}={before}: resume it with that, not {now}"
            )
    return replace(progress, batch_size=fresh.batch_size, seed=fresh.seed)


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
