"""Settling of requests: turn a user's request into a job for workers, and check it before any worker starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.commands.forecast import forecasts
from shardwise.errors import RequestError, RunFolderError, StrategyError, WorkloadError, nearest
from shardwise.launch.context import rank_context, under_launcher
from shardwise.launch.join import join_launcher
from shardwise.planner.plan_file import is_plan_file, read_plan
from shardwise.run.control_group import Workers
from shardwise.run.training.job import POLICIES, Job, Options
from shardwise.run.training.result import Forecast
from shardwise.run.training.run_folder import (
    RUNS,
    check_checkpoints,
    check_described,
    create_run,
    find_run,
    is_finished,
    last_request,
    new_folder,
    read_run,
    reopen_run,
)
from shardwise.run.training.tracking.choice import settle_trackers
from shardwise.strategy import Strategy
from shardwise.workload.one_batch import in_one_batch
from shardwise.workload.reading.check import check_data
from shardwise.workload.reading.draws import drawing_from
from shardwise.workload.reading.loader import Loader
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    from torch import nn

    from shardwise.splitting.balance import Cuts

AnyWorkload = str | Workload | Callable[..., Workload]
"""Type of a workload argument: a name (see `workload.load`), a workload, or a function that returns one."""

LONGEST_SECONDS = 1e6
"""Upper limit of options that are times."""

DEFAULT_COMPARED = 2
"""Number of workers of the strategies that `compare` chooses if none are given."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice that was made for a request, from its loaded workload: nothing is loaded, traced or predicted again.

    Attributes:
        source: source of the workload.
        workload: the workload, loaded.
        forecast: the prediction that the strategy was chosen by. None if nothing could be predicted.
        cuts: planned cut points of the model; empty: those of a plan file, else chosen by measured costs.
    """

    source: Source
    workload: Workload
    forecast: Forecast | None = None
    cuts: Cuts = ()


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Training as requested by the user; open choices are None or empty. `api.train` explains the fields."""

    workload: AnyWorkload
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    strategy: str | Strategy | None = None
    workers: int | None = None
    steps: int | None = None
    epochs: int | None = None
    track: str | Sequence[str] | None = None


def settle(
    asked: TrainingRequest,
    out: str | Path | None,
    *,
    resume: bool = False,
    on_disk: bool = True,
    chosen: Chosen | None = None,
    **options: Any,
) -> Job:
    """Return the checked job of a request.

    Args:
        asked: the request.
        out: the run's folder; None: a new one in runs/.
        resume: continue the run in `out`.
        on_disk: False: the job has no folder, and nothing is written.
        chosen: what `--strategy auto` has loaded and predicted to choose the strategy; None: load and predict.
        options: fields of `Options`.

    Raises:
        RequestError: it is impossible; the message says which part is wrong.
    """
    resumed = run_to_resume(out, asked) if resume else None
    asked = asked if resumed is None else as_before(asked, resumed)
    source = chosen.source if chosen else settle_source(asked.workload, asked.settings, asked.seed)
    strategy = settle_strategy(asked.strategy, asked.workers)
    settled = settle_options(steps=asked.steps, epochs=asked.epochs, track=asked.track, resume=resume, **options)
    if settled.track and not on_disk:
        raise RequestError(f"track={','.join(settled.track)}: trackers write to the run's folder: give out too")
    workload = chosen.workload if chosen else source.load()
    settled = settle_length(settled, workload)
    forecast = chosen.forecast if chosen else None
    if forecast is None:
        check(workload, strategy)
        (forecast,) = forecasts(workload, [strategy], quiet=settled.quiet)
    cut = (chosen.cuts if chosen else ()) or _cuts(asked.strategy)
    job = Job(source=source, strategy=strategy, options=settled, folder=resumed, forecast=forecast, cuts=cut)
    return replace(job, folder=settle_folder(out, workload, job)) if on_disk else job


def as_before(asked: TrainingRequest, folder: Path) -> TrainingRequest:
    """Return the request with open choices filled in from the run in `folder`.

    Raises:
        RunFolderError: the run's description is needed and cannot be read, or the run has lost its checkpoints.
    """
    same_length = asked.steps is None and asked.epochs is None
    same_split = asked.strategy is None and asked.workers is None and not under_launcher()
    try:
        before = last_request(read_run(folder))
    except RunFolderError as error:
        check_described(folder, error, open_ends=same_length or same_split)
        return asked
    check_checkpoints(folder)
    named = isinstance(asked.workload, str) and before["source"] is not None
    return replace(
        asked,
        settings={**before["settings"], **asked.settings} if named else asked.settings,
        seed=before["seed"] if asked.seed is None else asked.seed,
        strategy=Strategy.parse(before["strategy"]) if same_split else asked.strategy,  # `parse` reads no plan file
        steps=before["steps"] if same_length else asked.steps,
        epochs=before["epochs"] if same_length else asked.epochs,
        track=before.get("track") if asked.track is None else asked.track,
    )


def run_to_resume(out: str | Path | None, asked: TrainingRequest) -> Path:
    """Return the folder of the run to continue; see `run_folder.find_run`."""
    if out is not None:
        return find_run(Path(out), "")
    source = settle_source(asked.workload, asked.settings).workload
    return find_run(None, source if isinstance(source, str) else source.name)


def settle_resume(resume: bool | str, out: str | Path | None, asked: TrainingRequest) -> bool:
    """Return whether to continue a run.

    Args:
        resume: True, False, or `auto`, which means: if there is a run in `out`.
        out: the run's folder; None: with `auto`, an unfinished run in runs/ is continued.
        asked: the request.

    Raises:
        RequestError: `resume` is something else.
    """
    if isinstance(resume, bool):
        return resume
    if resume != "auto":
        raise RequestError(f"resume={resume}: must be True, False or 'auto'")
    try:
        folder = run_to_resume(out, asked)
    except RunFolderError:
        return False
    return out is not None or not is_finished(folder)


def settle_source(workload: AnyWorkload, settings: Mapping[str, Any] | None = None, seed: int | None = None) -> Source:
    """Return the source of a workload argument. Raises WorkloadError if it is none."""
    if isinstance(workload, str):
        return Source(workload=workload, settings=settings or {}, seed=seed)
    if isinstance(workload, Workload) and settings:
        raise WorkloadError(f"settings {sorted(settings)} need the function that makes workload {workload.name!r}")
    made: Any = workload
    if not isinstance(workload, Workload) and callable(workload):
        with drawing_from(seed or 0):
            made = workload(**(settings or {}))
    if not isinstance(made, Workload):
        raise WorkloadError(f"workload must be a name, a Workload or a function that returns one, not {workload!r}")
    return Source(workload=made, seed=seed)


def settle_strategy(strategy: str | Strategy | None, workers: int | None) -> Strategy:
    """Return the strategy of a spelling or plan file. None becomes `dp` over all workers.

    Raises:
        StrategyError: it is impossible, or needs another number of workers.
    """
    if workers is not None and workers < 1:
        raise StrategyError(f"workers={workers}: must be 1 or more")
    context = rank_context()
    if workers is None and context is not None:
        workers = context.workers
    if strategy is None:
        return Strategy(dp=workers or 1)
    settled = _read(strategy) if isinstance(strategy, str) else strategy
    if workers is not None:
        settled.check_workers(workers)
    return settled


def _read(text: str) -> Strategy:
    """Read a strategy from its spelling, or from a plan file (`*.toml`)."""
    if is_plan_file(text):
        return read_plan(Path(text)).strategy
    return Strategy.parse(text)


def _cuts(strategy: str | Strategy | None) -> Cuts | None:
    """Return the cut points of the model from a plan file. Returns None if there is no plan file or it has none."""
    named = isinstance(strategy, str) and is_plan_file(strategy)
    return (read_plan(Path(str(strategy))).cuts or None) if named else None


def settle_options(**values: Any) -> Options:
    """Return checked options of a training. Raises RequestError."""
    options = Options(**{**values, "track": settle_trackers(values.get("track"))})
    for name, least in (("steps", 1), ("epochs", 1), ("checkpoint_every", 0), ("keep", 1), ("grace", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise RequestError(f"{name}={value:g}: must be {least} or more")
    limit = options.hang_timeout
    if limit is not None and not 0 < limit <= LONGEST_SECONDS:
        raise RequestError(f"hang_timeout={limit:g}: must be a number of seconds above 0, at most {LONGEST_SECONDS:g}")
    if not options.grace <= LONGEST_SECONDS:
        raise RequestError(f"grace={options.grace:g}: must be a number of seconds, at most {LONGEST_SECONDS:g}")
    if options.on_nan not in POLICIES:
        known = f"known are {', '.join(POLICIES)}{nearest(options.on_nan, POLICIES)}"
        raise RequestError(f"on_nan={options.on_nan}: {known}")
    return options


def settle_length(options: Options, workload: Workload) -> Options:
    """Return the options with the workload's own epochs if they give neither steps nor epochs.

    Raises:
        WorkloadError: the workload asks for a fraction of an epoch of unknown length.
    """
    if options.steps is not None or options.epochs is not None:
        return options
    if float(workload.epochs).is_integer():
        return replace(options, epochs=int(workload.epochs))
    loader = Loader(
        dataset=workload.dataset, batch_size=workload.batch_size, seed=workload.seed, loading=workload.loading
    )
    batches = loader.batches
    if batches is None:
        raise WorkloadError(
            f"epochs={workload.epochs:g} of workload {workload.name!r}: its epochs have no known length to take a "
            "fraction of; use a whole number, or give --steps"
        )
    return replace(options, steps=max(1, round(workload.epochs * batches)))


def check(workload: Workload, strategy: Strategy) -> None:
    """Check that a workload can be trained under a strategy.

    Raises:
        StrategyError: the batch does not divide, the precision is not one that the strategy needs, or the model or the
            optimizer cannot be split in this way.
        WorkloadError: the model, the optimizer or the schedule cannot be built or used, or the weights to start from
            do not fit the model.
        DataError: the dataset is empty, or cannot be read.
    """
    strategy.precision_of(workload.precision)
    check_data(workload)
    in_one_batch(workload, strategy).for_batch(workload.batch_size)
    if workload.weights is not None:
        from shardwise.workload.warm_start import check_warm_start

        check_warm_start(workload)
    from shardwise.parallel.data.local_steps import check_local
    from shardwise.parallel.data.turns import check_turns
    from shardwise.parallel.optim.check import check_optimizer

    check_turns(workload, strategy)
    check_local(workload, strategy)
    check_optimizer(workload, strategy, check_step(workload, strategy))


def check_step(workload: Workload, strategy: Strategy) -> nn.Module:
    """Check that a step of a workload can run under a strategy here, and return its plain module without values.

    Raises:
        StrategyError, WorkloadError: as `check`.
    """
    import torch

    from shardwise.parallel.compiling.compiler import check_compiler
    from shardwise.parallel.operators.refused_modules import check_modules
    from shardwise.predict.profile.meta_model import builds

    check_compiler(strategy, "gpu" if torch.cuda.is_available() else "cpu")
    model = next(builds(workload)).module
    check_modules(workload, strategy, model)
    if not strategy.runs_module:
        from shardwise.parallel.check import check_strategy

        check_strategy(workload, strategy)
    return model


def settle_folder(out: str | Path | None, workload: Workload, job: Job) -> Path:
    """Create the run's folder, or reopen the job's to continue its run; return it. Collective under an outer launcher.

    Raises:
        RunFolderError: the folder is in use, or has a run of another workload.
    """
    description = {
        "workload": workload.name,
        "source": job.source.workload if isinstance(job.source.workload, str) else None,
        "settings": {name: str(value) for name, value in job.source.settings.items()},
        "seed": workload.seed,
        "strategy": str(job.strategy),
        "workers": job.strategy.workers,
        "steps": job.options.steps,
        "epochs": job.options.epochs,
        "track": None if job.options.track is None else list(job.options.track),
    }

    def make() -> Path:
        if job.folder is not None:
            return reopen_run(job.folder, description)
        return create_run(None if out is None else Path(out), description)

    if not under_launcher():
        return make()
    join_launcher(job.strategy.workers)
    workers = Workers()
    made = workers.all_or_none(lambda: str(make()) if workers.rank == 0 else "", RunFolderError)
    return Path(workers.exchange(made)[0])


def settle_verified(steps: int, dtype: str) -> tuple[int, str]:
    """Check the number of steps and the dtype of a verification, and return them. Raises RequestError."""
    if steps < 1:
        raise RequestError(f"steps={steps}: must be 1 or more")
    if dtype not in ("float32", "float64"):
        raise RequestError(f"dtype={dtype}: known are float32, float64{nearest(dtype, ('float32', 'float64'))}")
    return steps, dtype


def settle_slow(slow: Mapping[int, float]) -> dict[int, float]:
    """Check the slowdown factors by rank: each at least 1. Raises RequestError."""
    for rank, times in slow.items():
        if rank < 0:
            raise RequestError(f"slow={rank}={times:g}: a rank is 0 or more")
        if not 1.0 <= times < float("inf"):
            raise RequestError(f"slow={rank}={times:g}: how many times as long it computes is a number of 1 or more")
    return dict(slow)


def settle_comparison(out: str | Path | None, workload: Workload) -> Path:
    """Create the folder of a comparison: `out`, or a new one in runs/. Raises RunFolderError if it cannot be made."""
    if out is not None:
        return Path(out)
    try:
        return new_folder(f"{workload.name}-compare")
    except OSError as error:
        raise RunFolderError(f"{RUNS} cannot be made: {error.strerror}; use another --out") from error


def settle_bandwidth(times: float) -> float:
    """Check the factor of a cluster's bandwidths. Raises RequestError."""
    if not 1e-6 <= times <= 1e6:
        raise RequestError(f"bandwidth={times:g}: how many times the bandwidth of all links is from 1e-6 to 1e6")
    return times


def settle_file(path: Path, what: str) -> Path:
    """Check that a file can be written: it is no folder, and its parent exists. Raises RunFolderError."""
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder, give a file" if path.is_dir() else f"there is no folder {path.parent}"
        raise RunFolderError(f"{what}={path}: {found}")
    return path


def settle_document(folder: Path, name: str) -> Path:
    """Return the path of a command's document in a folder. Raises RunFolderError if the folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"out={folder}: is a file, give a folder")
    return folder / name


def settle_compared(
    workload: Workload, strategies: Sequence[str | Strategy], workers: int | None
) -> tuple[list[Strategy], list[tuple[str, str]]]:
    """Return the strategies to compare, and (strategy, reason) of default strategies that are impossible.

    Args:
        workload: workload to train.
        strategies: requested strategies; empty: one worker, and each axis over `workers` workers.
        workers: number of workers of the default strategies; None: DEFAULT_COMPARED.

    Raises:
        StrategyError: a requested strategy is impossible.
    """
    if strategies:
        settled: dict[Strategy, Strategy] = {}  # each strategy once, in the user's spelling
        for strategy in (settle_strategy(strategy, None) for strategy in strategies):
            check(workload, strategy)
            settled.setdefault(strategy.for_batch(workload.batch_size), strategy)
        return list(settled.values()), []
    count = settle_strategy(None, workers or DEFAULT_COMPARED).workers
    fitting, refused = [], []
    axes = ("dp", "fsdp", "tp", "pp") if count > 1 else ()
    for strategy in [Strategy(), *(Strategy.parse(f"{axis}={count}") for axis in axes)]:
        try:
            check(workload, strategy)
        except (StrategyError, WorkloadError) as error:
            refused.append((str(strategy), str(error)))
        else:
            fitting.append(strategy)
    return fitting, refused
