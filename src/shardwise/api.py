"""What scripts and notebooks call, and all that the command line does: each function reads as the flow.

request -> checked -> workers -> program -> run -> summary
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.errors import NotMeasured, RequestError, StrategyError
from shardwise.launch.context import under_launcher
from shardwise.launch.join import join_launcher, threads_per_worker
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import nn

    from shardwise.parallel.program import Program
    from shardwise.run.job import Job
    from shardwise.run.result import Trained


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What `train_parallel` returns.

    Attributes:
        model: the trained module, plain and on the CPU.
        metrics: the last evaluation: loss and metric on held-out data; empty without one.
        history: one entry per step: step, epoch, loss, learning_rate, gradient_norm, samples, seconds.
        summary: the document of `shardwise train --json`: speed, memory, share of time spent communicating.
        run: the run's folder; None where none was asked for.
    """

    model: nn.Module
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    run: Path | None


def train(
    workload: str | Workload | Callable[..., Workload],
    *,
    strategy: str | Strategy | None = None,
    workers: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    resume: bool | str = False,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    checkpoint_every: int = 0,
    keep: int = 3,
    hang_timeout: float | None = None,
    grace: float = 20.0,
    quiet: bool = False,
    on_nan: str = "stop",
) -> dict[str, Any]:
    """Trains a workload on local workers, or as one of the workers of an outer torchrun.

    Args:
        workload: a recipe's name, `file.py:function`, `module:function`, a `Workload`, or a function that returns one.
        strategy: how to split it; None or `auto`: the fastest that fits this machine, with `explanation` and
            `verdict` in the document. With None it is `dp` over all workers where the machine may not be measured.
        workers: number of workers; None: what the strategy needs, what is fastest, or 1 where nothing was measured.
        steps: optimizer steps, those before a resume included.
        epochs: passes over the dataset; with neither steps nor epochs there is one.
        out: the run's folder; None: a new one in runs/.
        resume: go on with the run in `out` (None: the newest of this workload). What is not given is as the run had
            it; another strategy may be given. `"auto"`: go on where there is such a run, else begin one.
        settings: parameters of the workload's function.
        seed: of weights, data order and dropout; None: the workload's own.
        checkpoint_every: optimizer steps between checkpoints; 0: one after each epoch.
        keep: how many checkpoints stay.
        hang_timeout: seconds that a worker may take for a step before the run counts as hung and is ended; None: ten
            times the predicted step, at least 60 s.
        grace: seconds that the run has to write a checkpoint when it is told to end (SIGTERM).
        quiet: no progress bar.
        on_nan: what to do at a step whose loss or gradient is not finite. `stop`: nothing of it is applied, and the
            training ends with NotFinite. `skip`: its update is left out, on all workers; after 20 in a row it stops.
            `go`: train on. Each tells the step and the first module whose output is not finite.

    Returns:
        The document that `shardwise train --json` prints.

    Raises:
        RequestError: the request is wrong; found before any worker starts, but for a checkpoint that does not fit.
        WorkerFailed: a worker died; WorkerHung, which is one: a worker did not get on.
        NotFinite: a loss or a gradient is infinite or not a number.
        SystemExit: the run was told to end, and has written a checkpoint.
    """
    from shardwise.run.job import run_job
    from shardwise.run.request import Asked, settle, settle_resume

    asked = Asked(workload, settings or {}, seed, strategy, workers, steps, epochs)
    resumed = settle_resume(resume, out, asked)
    options: dict[str, Any] = {
        "checkpoint_every": checkpoint_every,
        "keep": keep,
        "hang_timeout": hang_timeout,
        "grace": grace,
        "quiet": quiet,
        "on_nan": on_nan,
    }
    if strategy in (None, "auto") and not resumed:
        from shardwise.run.automatic import train_automatically

        return train_automatically(asked, out, **options)
    return run_job(settle(asked, out, resume=resumed, **options)).summary


def train_parallel(
    model: nn.Module | Callable[[], nn.Module],
    dataset: Any,
    loss: Callable[..., Any],
    *,
    batch_size: int,
    workers: int | None = None,
    strategy: str | Strategy | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
    evaluation: Any = None,
    metric: str | Callable[..., Any] = "loss",
    out: str | Path | None = None,
    quiet: bool = False,
    on_nan: str = "stop",
    **fields: Any,
) -> TrainedModel:
    """Trains a plain model in parallel, from a script or a notebook, and returns it.

        loss = nn.CrossEntropyLoss()
        trained = train_parallel(model, (images, labels), loss, batch_size=64, strategy="dp=2", epochs=3)

    Args:
        model: the module to train (it stays as it is; a copy is trained), or a function that makes one.
        dataset: a torch dataset, or a pair of tensors: data and labels, one of each per sample.
        loss: of (output, labels), `nn.CrossEntropyLoss()` or `F.cross_entropy` say, where samples are pairs (data,
            label). Of (output, batch) where `inputs` is given, or where its second parameter is called `batch`.
            The mean over the samples.
        batch_size: global: samples per optimizer step over all workers.
        workers: number of workers; None: what the strategy needs, else 1.
        strategy: how to split it; None: `dp` over all workers.
        optimizer: parameters -> torch optimizer; None: AdamW with lr=1e-3.
        steps: optimizer steps.
        epochs: passes over the dataset; with neither steps nor epochs there is one.
        inputs: batch -> what the model is called with; None: samples are pairs, the model gets the first part.
        evaluation: held-out data, like `dataset`, or an `Evaluation`.
        metric: what to measure on it besides the loss: `accuracy`, or a function like `loss`.
        out: the run's folder; None: nothing is written to disk.
        quiet: no progress bar.
        on_nan: as in `train`.
        fields: further fields of `Workload`: weight, collate, schedule, clip_norm, precision, seed.

    Raises:
        RequestError: the request is wrong; found before any worker starts.
        WorkerFailed: a worker died.
        NotFinite: a loss or a gradient is infinite or not a number.
    """
    from shardwise.run.job import run_job
    from shardwise.run.request import Asked, settle
    from shardwise.workload.plain import plain_workload

    plain = plain_workload(
        model,
        dataset,
        loss,
        batch_size=batch_size,
        inputs=inputs,
        optimizer=optimizer,
        evaluation=evaluation,
        metric=metric,
        **fields,
    )
    asked = Asked(plain, strategy=strategy, workers=workers, steps=steps, epochs=epochs)
    job = settle(asked, out, on_disk=out is not None, quiet=quiet, weights=True, on_nan=on_nan)
    return _trained_model(plain, job, run_job(job))


def parallelize(workload: str | Workload | Callable[..., Workload], strategy: str | Strategy = "single") -> Program:
    """The parallel program of a workload, for those who keep their own training loop; collective.

    To be called in each process that torchrun (or another launcher) started; `single` needs none.

        program = parallelize(workload, "dp=2")
        for batch in batches:                   # a global batch, the same on all workers
            loss = program.step(batch)

    Raises:
        RequestError: the request is wrong, or there are not as many workers as the strategy needs.
    """
    from shardwise.parallel.program import Program
    from shardwise.run.request import check, settle_source, settle_strategy

    settled = settle_strategy(strategy, None)
    if under_launcher():
        join_launcher(settled.workers)
    elif settled.workers > 1:
        raise StrategyError(
            f"strategy {settled} needs {settled.workers} workers, this is one process: "
            f"start it with torchrun --nproc-per-node {settled.workers}"
        )
    loaded = settle_source(workload).load()
    check(loaded, settled)
    return Program.build(loaded, settled)


def compare(
    workload: str | Workload | Callable[..., Workload],
    strategies: Sequence[str | Strategy] = (),
    *,
    workers: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a workload under one strategy after another, from the same weights on the same data, and measures each.

    Without strategies: one worker, and every single axis over `workers` (None: 2) workers that can be. `auto` among
    them is the one that `train` would choose, on `workers` (None: as many as are fastest). `out` gets one run's folder
    per strategy; None: nothing is written to disk. Everything else is as in `train`.

    Returns:
        The document that `shardwise compare --json` prints.

    Raises:
        RequestError: the request is wrong, a strategy that was asked for included; found before any worker starts.
        WorkerFailed: a worker died.
    """
    from shardwise.run.compare import comparison
    from shardwise.run.forecast import forecasts
    from shardwise.run.job import Job, enough_gpus, run_job
    from shardwise.run.log import finite
    from shardwise.run.request import settle_compared, settle_options, settle_source

    if under_launcher():
        raise RequestError("compare starts its own workers, as many as each strategy needs: run it without torchrun")
    source, options = (
        settle_source(workload, settings, seed),
        settle_options(steps=steps, epochs=epochs, quiet=quiet, on_nan="go"),
    )
    loaded = source.load()
    auto: Strategy | None = None
    if "auto" in strategies:
        from shardwise.run.automatic import choose

        auto = choose(loaded, workers, quiet=quiet).best.strategy
        strategies = [auto if strategy == "auto" else strategy for strategy in strategies]
    compared, refused = settle_compared(loaded, strategies, workers)
    most = max(settled.workers for settled in compared)
    threads, gpus = threads_per_worker(most), enough_gpus(most)  # the same for all: a worker is a worker
    predicted = forecasts(loaded, compared, threads, quiet=quiet)
    jobs = [
        Job(source=source, strategy=settled, options=options, forecast=forecast)
        for settled, forecast in zip(compared, predicted, strict=True)
    ]
    if out is not None:
        jobs = [replace(job, folder=_folder_in(Path(out), loaded, job)) for job in jobs]
    trained = [run_job(job, threads=threads, gpus=gpus) for job in jobs]
    document: dict[str, Any] = finite(comparison(trained, refused, threads)) | {"auto": auto and str(auto)}
    return document


def verify(
    workload: str | Workload | Callable[..., Workload],
    strategies: Sequence[str | Strategy],
    *,
    steps: int = 3,
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Shows that training under each strategy is the same training as on one worker, or what differs.

    The same steps from the same weights on the same data, on one worker and in parallel; losses, all gradients and all
    updated parameters and buffers are compared as full tensors.

    Args:
        workload: as in `train`.
        strategies: what to verify, one after the other.
        steps: optimizer steps.
        dtype: float32, or float64 for a strict pass, where nothing but a mistake can hide behind rounding.
        settings: parameters of the workload's function.
        seed: of weights, data order and dropout; None: the workload's own.
        out: folder that gets the document as `verification.json`; None: nothing is written to disk.

    Returns:
        The document that `shardwise verify --json` prints.

    Raises:
        RequestError: the request is wrong; found before any worker starts.
        WorkerFailed: a worker died.
    """
    from shardwise.run.jsonfile import write_json
    from shardwise.run.log import finite
    from shardwise.run.request import check, settle_document, settle_source, settle_strategy, settle_verified
    from shardwise.run.verify import verification
    from shardwise.run.verify import verify as verify_each

    if under_launcher():
        raise RequestError("verify starts its own workers, as many as each strategy needs: run it without torchrun")
    source = settle_source(workload, settings, seed)
    steps, dtype = settle_verified(steps, dtype)
    path = None if out is None else settle_document(Path(out), "verification.json")
    loaded = source.load()
    settled = [settle_strategy(strategy, None) for strategy in strategies]
    if not settled:
        raise RequestError("nothing to verify: give a strategy, for example --strategy dp=2")
    for strategy in settled:
        check(loaded, strategy)
    threads = threads_per_worker(max(strategy.workers for strategy in settled))
    proofs = verify_each(source, settled, steps=steps, float64=dtype == "float64", threads=threads)
    document: dict[str, Any] = finite(verification(loaded.name, proofs, dtype))
    if path is not None:
        write_json(path, document)
    return document


def simulate(
    workload: str | Workload | Callable[..., Workload],
    strategies: Sequence[str | Strategy],
    *,
    cluster: str,
    trace: str | Path | None = None,
    slow: Mapping[int, float] | None = None,
    dry_run: bool = False,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Predicts what strategies cost on a cluster; nothing is trained, and no device of it is needed.

    Args:
        workload: as in `train`.
        strategies: what to predict. One that cannot be is told among the rejected ones if another can.
        cluster: devices of the catalogue (`h100x1024`, `dgx-a100`), or a cluster file.
        trace: file that gets the steps as Perfetto and chrome://tracing show them; they are played as events then, in
            place of the closed form. None: none is written.
        slow: rank -> how many times as long as usual it computes; steps are played then, too.
        dry_run: also run a step of the real program of the worker that needs most memory, on workers and tensors that
            are not there; each candidate then has what it sent and held beside what was predicted of it.
        settings: parameters of the workload's function.
        seed: of weights, data order and dropout; None: the workload's own.

    Returns:
        The document that `shardwise simulate --json` prints.

    Raises:
        RequestError: the cluster or the workload is wrong, or no strategy can be.
    """
    from shardwise.cluster.find import find_cluster
    from shardwise.predict.simulate import simulation
    from shardwise.report.perfetto import chrome_trace
    from shardwise.run.jsonfile import write_json
    from shardwise.run.log import finite
    from shardwise.run.request import settle_file, settle_slow, settle_source, settle_strategy

    settled = [settle_strategy(strategy, None) for strategy in strategies]
    if not settled:
        raise RequestError("nothing to predict: give a strategy, for example --strategy dp=8")
    path = None if trace is None else settle_file(Path(trace), "trace")
    slowed = settle_slow(slow or {})
    found = find_cluster(cluster)
    loaded = settle_source(workload, settings, seed).load()
    simulated = simulation(loaded, settled, found, play=path is not None, slowed=slowed, dry=dry_run)
    if path is not None:
        steps = {strategy: timeline.document() for strategy, timeline in simulated.timelines.items()}
        write_json(path, finite(chrome_trace(steps)))
    document: dict[str, Any] = finite(simulated.document)
    return document


def plan(
    workload: str | Workload | Callable[..., Workload],
    *,
    cluster: str | None = None,
    workers: int | str | None = None,
    objective: str = "time",
    max_memory: str | None = None,
    fix: Sequence[str] = (),
    forbid: Sequence[str] = (),
    out: str | Path | None = None,
    dry_run: bool = False,
    pareto: bool = False,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Finds the best strategy for a workload on a cluster, and says why the others lost.

    Args:
        workload: as in `train`.
        cluster: as in `simulate`; None: this machine, as `calibrate` measured it.
        workers: devices to use; `"1..64"`: from one to so many, for the curve of scaling. None: all of the cluster.
        objective: `time`, `memory` or `money`: what is to be small.
        max_memory: of a device, for example `40GiB`. None: what it has.
        fix: options that the strategy must have, for example `tp=8`.
        forbid: options that it must not have, for example `pp`, `schedule=gpipe`.
        out: where to write the chosen one as a plan file.
        dry_run: also run the real program of the finalists, on workers and tensors that are not there: those that need
            more memory than there is are rejected. Seconds for each of a small model, up to a minute of a large one.
        pareto: also search for the front of time and memory: the fastest strategy for each smaller need of memory, in
            steps of a twentieth. Takes a search for each.
        settings: parameters of the workload's function.
        seed: of weights, data order and dropout; None: the workload's own.

    Returns:
        The document that `shardwise plan --json` prints.

    Raises:
        RequestError: the cluster, the workload or a wish is wrong; two wishes contradict each other.
        DoesNotFit: no strategy fits into the devices.
    """
    from shardwise.run.log import finite
    from shardwise.run.planning import planned
    from shardwise.run.request import settle_source

    source = settle_source(workload, settings, seed)
    document: dict[str, Any] = finite(
        planned(
            source,
            cluster,
            workers,
            objective=objective,
            max_memory=max_memory,
            fix=fix,
            forbid=forbid,
            out=None if out is None else Path(out),
            dry_run=dry_run,
            pareto=pareto,
        )
    )
    return document


def check_plan(path: str | Path, *, cluster: str | None = None, workload: str | None = None) -> dict[str, Any]:
    """Says whether a plan file still holds.

    Args:
        path: of the plan file.
        cluster: as in `plan`; None: the one that the plan was made for.
        workload: the file's, which must be given where it is a function: a file alone runs no code of others.

    Returns:
        The document that `shardwise plan --check --json` prints: `holds`, and `reasons` where it does not.

    Raises:
        RequestError: the file cannot be read, the workload or the cluster of it is wrong, or its workload is a function
            and is not given.
    """
    from shardwise.run.log import finite
    from shardwise.run.planning import checked

    document: dict[str, Any] = finite(checked(Path(path), cluster, workload))
    return document


def calibrate(out: str | Path = "cluster.toml", *, workers: int | None = None, quiet: bool = False) -> dict[str, Any]:
    """Measures this machine, so that predictions for it can be made, and writes what was found as a cluster file.

    It is kept in the user's cache folder too, for the predictions of `train` and `compare`.

    Args:
        out: the file.
        workers: the largest number of workers to measure, on local processes; None: 4 on a CPU, one for each GPU.
            Under an outer torchrun all of its workers measure, over all hosts.
        quiet: no progress bar.

    Returns:
        The document that `shardwise calibrate --json` prints.

    Raises:
        RequestError: there cannot be so many workers, or the file cannot be written.
        WorkerFailed: a worker died.
    """
    from shardwise.cluster.writing import check_place, write_cluster
    from shardwise.run.at_hand import check_place as check_kept
    from shardwise.run.at_hand import keep
    from shardwise.run.calibrate import calibrate as measure
    from shardwise.run.calibrate import summary

    check_place(out)
    begin = time.perf_counter()
    cluster = measure(workers, quiet=quiet)
    if cluster is None:  # another worker of an outer launcher has it
        return {"cluster": str(out)}
    write_cluster(cluster, out)
    try:
        check_kept()
    except NotMeasured as error:
        if not quiet:
            sys.stderr.write(f"{out} is written; {error}\n")
    else:
        keep(cluster)
    return summary(cluster, Path(out), time.perf_counter() - begin)


def validate(runs: str | Path) -> dict[str, Any]:
    """Holds predictions against training runs that others measured.

    Args:
        runs: a CSV file, one run a row, with the columns of tests/published/README.md.

    Returns:
        The document that `shardwise validate --json` prints; errors are absolute and relative.

    Raises:
        DataError: the file cannot be read, or no row of it says what is needed.
    """
    from shardwise.predict.published.validate import validate as validate_runs

    return validate_runs(runs)


def export(run: str | Path, out: str | Path) -> None:
    """Writes the plain full weights of a run's newest checkpoint to the safetensors file `out`.

    Raises:
        RunFolderError: there is no run in the folder `run`.
        CheckpointError: it has no checkpoint that is whole.
    """
    from shardwise.run.export import export_safetensors

    export_safetensors(Path(run), Path(out))


def _folder_in(parent: Path, workload: Workload, job: Job) -> Path:
    from shardwise.run.request import settle_folder

    return settle_folder(parent / str(job.strategy).replace("=", "").replace(",", "-"), workload, job)


def _trained_model(workload: Workload, job: Job, trained: Trained) -> TrainedModel:
    """The plain module with the trained weights, on all workers where an outer launcher started several."""
    from shardwise.run.weights import filled_model

    return TrainedModel(
        model=filled_model(workload, trained.weights),
        metrics=trained.summary["metrics"],
        history=[asdict(step) for step in trained.steps],
        summary=trained.summary,
        run=job.folder,
    )
