"""Public functions of Shardwise: scripts and notebooks call them, and each command of the command line calls one.

Each function reads in the order of the work: request -> checks -> workers -> program -> run -> summary.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.errors import NotMeasured, RequestError, StrategyError, nearest
from shardwise.launch.context import under_launcher
from shardwise.launch.join import join_launcher, threads_per_worker
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import nn

    from shardwise.parallel.program import Program
    from shardwise.run.training.job import Job
    from shardwise.run.training.result import Trained


logger = logging.getLogger(__name__)

LONGEST_PAUSE = 1e6
"""Upper limit of the seconds between two states of a run."""

EXPORT_FORMS = ("file", "folder", "adapter")
"""Forms that `export` writes."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Result of `train_parallel`: the trained module and the measurements of its training.

    Attributes:
        model: the trained module, plain and on the CPU.
        metrics: loss and metric on held-out data at the last evaluation; empty without an evaluation.
        history: one entry per step: step, epoch, loss, learning_rate, gradient_norm, samples, seconds.
        summary: the document of `shardwise train --json`: speed, memory, share of time spent communicating.
        run: the run's folder; None if none was requested.
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
    proof: bool = True,
    margin: float | None = None,
    allow: Sequence[str] = (),
    track: str | Sequence[str] | None = None,
    engine: str | None = None,
    hosts: str | None = None,
) -> dict[str, Any]:
    """Train a workload on local workers, on those of an engine, or as one of those that an outer torchrun started.

    Args:
        workload: a recipe's name, `file.py:function`, `module:function`, a `Workload`, or a function that returns one.
        strategy: how to split a step over workers. None or `auto` selects the fastest strategy that fits this machine,
            and adds `explanation` and `verdict` to the document. None falls back to `dp` over all workers if the
            machine may not be measured.
        workers: number of workers; None: as many as the strategy needs, as many as are fastest, or 1 if the machine was
            not measured.
        steps: optimizer steps in total, including steps before a resume.
        epochs: passes over the dataset; the default is the workload's if neither steps nor epochs are given.
        out: the run's folder; None: a new one in runs/.
        resume: continue the run in `out` (None: the newest run of this workload). Arguments that are not given keep
            the run's values; the strategy may change. `"auto"`: continue if there is such a run, else begin one.
        settings: parameters of the workload's function.
        seed: seed of weights, data order and dropout; None: the workload's own.
        checkpoint_every: optimizer steps between checkpoints; 0: one after each epoch.
        keep: number of checkpoints to keep.
        hang_timeout: seconds that a worker may take for a step before the run counts as hung and is ended; None: ten
            times the predicted step, at least 60 s, and ten times as long while a worker computes.
        grace: seconds that the run has to write a checkpoint when it is told to end (SIGTERM).
        quiet: show no progress bar.
        on_nan: policy for a step whose loss or gradient is not finite. `stop`: do not apply the update, and end the
            training with NotFinite. `skip`: leave out the update on all workers; stop after 20 in a row. `go`: train
            on. Each policy reports the step and the first module whose output is not finite.
        proof: compare the loss and gradient of the first step with those of one process before training.
        margin: share of the usable memory that the chosen strategy leaves free; None: 0.05. Only for the strategy
            `auto`, or None.
        allow: how the chosen strategy may change training: `lossy`, `async`. Only for the strategy `auto`, or None.
        track: trackers that get the metrics: `tensorboard`, `wandb`, `mlflow`, several with commas between them or as a
            list, or `none`. None: TensorBoard if it is installed, or those of the run that is resumed.
        engine: what starts the workers: `torchrun`, `mpi`, `slurm` or `ray`; None: local workers. With Ray, they run in
            the cluster that the program has joined by `ray.init`. The workload is then a name, or a function of a file,
            and `out` a folder that all hosts share.
        hosts: hosts for the engine, with commas between them; None: the engine chooses.

    Returns:
        The document that `shardwise train --json` prints.

    Raises:
        RequestError: the request is wrong. This is found before any worker starts, except a checkpoint that does not
            fit.
        WorkerFailed: a worker died. Its subclass WorkerHung: a worker made no progress.
        NotFinite: a loss or a gradient is infinite or not a number.
        NotProved: the first step is not that of one process; nothing was trained.
        SystemExit: the run was told to end, and has written a checkpoint.
    """
    from shardwise.commands.reported import run_reported
    from shardwise.commands.request import TrainingRequest, settle, settle_resume

    if engine not in (None, "local") and not under_launcher():
        from shardwise.commands.launching import train_under

        return train_under(
            engine,
            workload,
            out=out,
            hosts=hosts,
            resume=resume,
            settings=settings or {},
            proof=proof,
            strategy=strategy,
            workers=workers,
            steps=steps,
            epochs=epochs,
            seed=seed,
            checkpoint_every=checkpoint_every,
            keep=keep,
            hang_timeout=hang_timeout,
            grace=grace,
            quiet=quiet,
            on_nan=on_nan,
            margin=margin,
            allow=allow,
            track=track,
        )
    asked = TrainingRequest(workload, settings or {}, seed, strategy, workers, steps, epochs, track)
    resumed = settle_resume(resume, out, asked)
    options: dict[str, Any] = {
        "checkpoint_every": checkpoint_every,
        "keep": keep,
        "hang_timeout": hang_timeout,
        "grace": grace,
        "quiet": quiet,
        "on_nan": on_nan,
        "proof": proof,
    }
    if strategy in (None, "auto") and not resumed:
        from shardwise.commands.auto import train_automatically

        return train_automatically(asked, out, margin=margin, allow=allow, **options)
    if margin is not None:
        raise RequestError(
            f"margin={margin:g}: only a strategy that is chosen leaves a margin: leave it out, or strategy"
        )
    if allow:
        raise RequestError(
            f"allow={','.join(allow)}: only a strategy that is chosen needs to be allowed: leave it out, or strategy"
        )
    return run_reported(settle(asked, out, resume=resumed, **options)).summary


def run_under(
    engine: str,
    arguments: Sequence[str],
    *,
    strategy: str | None = None,
    workers: int | None = None,
    hosts: str | None = None,
    grace: float = 0.0,
    image: str | None = None,
    dry_run: bool = False,
) -> int | str:
    """Run a command line of `shardwise` on workers that another engine starts, and return its exit status.

    Args:
        engine: `torchrun`, `mpi`, `slurm`, `ray`, `spark` or `kubernetes`.
        arguments: the command line; options that name the engine are left out of it.
        strategy: strategy of the training; None or `auto`: the workers choose it.
        workers: number of workers; None: what the strategy needs, or what the allocation has.
        hosts: hosts to run on, with commas between them; None: the engine chooses.
        grace: seconds that the run has to write a checkpoint when it is told to end.
        image: container image of the workers, for `kubernetes`.
        dry_run: start nothing, and return the text of the engine's script or manifest.

    Raises:
        RequestError: the request is wrong, the engine is not installed, hosts cannot be reached, or the allocation has
            another size; found before anything starts.
        SystemExit: the job was told to end.
    """
    from shardwise.commands import launching

    return launching.run_under(
        engine,
        arguments,
        strategy=strategy,
        workers=workers,
        hosts=hosts,
        grace=grace,
        image=image,
        dry_run=dry_run,
    )


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
    proof: bool = True,
    track: str | Sequence[str] | None = None,
    **fields: Any,
) -> TrainedModel:
    """Train a plain model in parallel, from a script or a notebook, and return it.

        loss = nn.CrossEntropyLoss()
        trained = train_parallel(model, (images, labels), loss, batch_size=64, strategy="dp=2", epochs=3)

    Args:
        model: the module to train (it stays unchanged; a copy is trained), or a function that makes one.
        dataset: a torch dataset, or a pair of tensors: data and labels, one of each per sample.
        loss: function of (output, labels), such as `nn.CrossEntropyLoss()` or `F.cross_entropy`, if samples are pairs
            (data, label). It is a function of (output, batch) if `inputs` is given, or if its second parameter is
            called `batch`. It returns the mean over the samples.
        batch_size: global batch size: samples per optimizer step over all workers.
        workers: number of workers; None: as many as the strategy needs, else 1.
        strategy: how to split a step over workers; None: `dp` over all workers.
        optimizer: function that takes the parameters and returns a torch optimizer; None: AdamW with lr=1e-3.
        steps: number of optimizer steps.
        epochs: passes over the dataset; the default is 1 if neither steps nor epochs are given.
        inputs: function that takes a batch and returns the model's input; None: samples are pairs, and the model gets
            the first part.
        evaluation: held-out data, like `dataset`, or an `Evaluation` or several.
        metric: second quantity to measure on held-out data besides the loss: `accuracy`, or a function like `loss`.
        out: the run's folder; None: nothing is written to disk.
        quiet: show no progress bar.
        on_nan: as in `train`.
        proof: as in `train`.
        track: as in `train`; needs `out`.
        fields: further fields of `Workload`: step, weight, collate, loading, schedule, schedule_every, groups,
            clip_norm, precision, float32, seed, whole_batch, stop, average, after_step, callbacks.

    Raises:
        RequestError: the request is wrong; found before any worker starts.
        WorkerFailed: a worker died.
        NotFinite: a loss or a gradient is infinite or not a number.
        NotProved: the first step is not that of one process; nothing was trained.
    """
    from shardwise.commands.reported import run_reported
    from shardwise.commands.request import TrainingRequest, settle
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
    asked = TrainingRequest(plain, strategy=strategy, workers=workers, steps=steps, epochs=epochs, track=track)
    job = settle(asked, out, on_disk=out is not None, quiet=quiet, weights=True, on_nan=on_nan, proof=proof)
    return _trained_model(plain, job, run_reported(job))


def parallelize(
    workload: str | Workload | Callable[..., Workload], strategy: str | Strategy = "single", *, proof: bool = True
) -> Program:
    """Build the parallel program of a workload, for users who keep their own training loop; collective.

    Call it in each process that torchrun (or another launcher) started. The strategy `single` needs no launcher.

        program = parallelize(workload, "dp=2")
        for batch in batches:                   # a global batch, the same on all workers
            loss = program.step(batch)
        program.next_epoch(program.evaluate())  # for a schedule that moves by epochs

    Args:
        workload: as in `train`.
        strategy: how to split a step over workers.
        proof: compare the loss and gradient of a step on the first batch of the dataset with those of one process.

    Raises:
        RequestError: the request is wrong, or there are not as many workers as the strategy needs.
        NotProved: the first step is not that of one process.
    """
    from shardwise.commands.request import check, settle_source, settle_strategy
    from shardwise.parallel.program import Program
    from shardwise.run.verification.first_step import prove_first_step

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
    program = Program.build(loaded, settled)
    if proof:
        proved = prove_first_step(program)
        if program.mesh.rank == 0:
            logger.info("%s", proved)
    return program


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
    proof: bool = True,
    by_hand: bool = True,
) -> dict[str, Any]:
    """Train a workload under several strategies in turns, from the same weights on the same data, and measure each.

    The workers of all strategies live at the same time, and a slice of the steps of each is trained in turn: A B A B.
    Those that memory does not hold at once, and all on GPUs, train one after the other; `groups` says so. A strategy
    that fails has its row with the reason, and the others go on.

    Args:
        workload: as in `train`.
        strategies: strategies to compare. If none are given: one worker, and each single axis over `workers` (None: 2)
            workers that this workload supports. `auto` stands for the strategy that `train` would choose, on `workers`
            (None: as many as are fastest).
        workers: number of workers for the strategies that do not state it, see above.
        steps: as in `train`.
        epochs: as in `train`.
        out: folder that gets one run's folder per strategy, the document and a report; None: a new one in runs/.
        settings: as in `train`.
        seed: as in `train`.
        quiet: as in `train`.
        proof: as in `train`.
        by_hand: let torch's DDP and FSDP2, as users write them by hand, take turns with `dp=K` and `fsdp=K`.

    Returns:
        The document that `shardwise compare --json` prints.

    Raises:
        RequestError: the request is wrong, or a requested strategy is; found before any worker starts.
        ShardwiseError: all strategies failed; the error is that of the first.
        ComparisonInterrupted: Ctrl-C, a KeyboardInterrupt whose `document` has what was measured until then.
        ComparisonTerminated: a signal told the comparison to end, a SystemExit with the same `document`.
    """
    from shardwise.commands.compare import compared
    from shardwise.commands.forecast import forecasts, reference_here
    from shardwise.commands.report import leaving_report, report_in
    from shardwise.commands.reported import what_if_of
    from shardwise.commands.request import (
        settle_compared,
        settle_comparison,
        settle_length,
        settle_options,
        settle_source,
    )
    from shardwise.launch.local import enough_gpus
    from shardwise.run.training.job import Job

    if under_launcher():
        raise RequestError("compare starts its own workers, as many as each strategy needs: run it without torchrun")
    source = settle_source(workload, settings, seed)
    options = settle_options(steps=steps, epochs=epochs, quiet=True, on_nan="go", proof=proof)
    loaded = source.load()
    options = settle_length(options, loaded)
    auto: Strategy | None = None
    if "auto" in strategies:
        from shardwise.commands.auto import choose

        auto = choose(loaded, workers, quiet=quiet).best.strategy
        strategies = [auto if strategy == "auto" else strategy for strategy in strategies]
    settled, refused = settle_compared(loaded, strategies, workers)
    most = max(strategy.workers for strategy in settled)
    threads, gpus = threads_per_worker(most), enough_gpus(most)  # equal for all strategies, so that rows compare
    predicted = forecasts(loaded, settled, threads, quiet=quiet)
    reference = reference_here() if any(forecast.seconds for forecast in predicted) else None
    jobs = [
        Job(source=source, strategy=strategy, options=options, forecast=forecast)
        for strategy, forecast in zip(settled, predicted, strict=True)
    ]
    folder = settle_comparison(out, loaded)
    jobs = [replace(job, folder=_folder_in(folder, loaded, job)) for job in jobs]
    with leaving_report(folder, what_if_of(jobs, threads)):
        document = compared(
            loaded,
            jobs,
            refused,
            auto=None if auto is None else str(auto),
            threads=threads,
            gpus=gpus,
            by_hand=by_hand,
            reference=reference,
            out=folder,
            quiet=quiet,
        )
    return {**document, **report_in(folder)}


def verify(
    workload: str | Workload | Callable[..., Workload],
    strategies: Sequence[str | Strategy],
    *,
    steps: int = 3,
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Show that training under each strategy equals training on one worker, or report what differs.

    Both run identical steps, from equal weights on equal data. Losses, all gradients, and all updated parameters and
    buffers are compared as full tensors.

    Args:
        workload: as in `train`.
        strategies: strategies to verify, one after the other.
        steps: number of optimizer steps.
        dtype: float32, or float64 for a strict pass in which no mistake can hide behind rounding.
        settings: parameters of the workload's function.
        seed: seed of weights, data order and dropout; None: the workload's own.
        out: folder that gets the document as `verification.json`; None: nothing is written to disk.
        report: file that gets the result as a page of HTML; None: none is written.

    Returns:
        The document that `shardwise verify --json` prints.

    Raises:
        RequestError: the request is wrong; found before any worker starts.
        WorkerFailed: a worker died.
    """
    from shardwise.commands.report_files import VERIFICATION
    from shardwise.commands.request import (
        check,
        settle_document,
        settle_file,
        settle_source,
        settle_strategy,
        settle_verified,
    )
    from shardwise.run.jsonfile import write_json
    from shardwise.run.training.log import finite
    from shardwise.run.verification.verify import verification
    from shardwise.run.verification.verify import verify as verify_each

    if under_launcher():
        raise RequestError("verify starts its own workers, as many as each strategy needs: run it without torchrun")
    source = settle_source(workload, settings, seed)
    steps, dtype = settle_verified(steps, dtype)
    path = None if out is None else settle_document(Path(out), VERIFICATION)
    page = None if report is None else settle_file(Path(report), "report")
    loaded = source.load()
    settled = [settle_strategy(strategy, None) for strategy in strategies]
    if not settled:
        raise RequestError("nothing to verify: give a strategy, for example --strategy dp=2")
    for strategy in settled:
        if strategy.states and steps > 1:
            raise RequestError(
                f"{strategy} rounds the optimizer states after each step, and updates differ from the second step on: "
                "verify it with --steps 1"
            )
        if strategy.stale:
            raise RequestError(
                f"{strategy} computes with parameters that are not the newest, so that it differs from one process: "
                "verify it with staleness=0; train proves the gradient of its first step"
            )
        check(loaded, strategy)
    threads = threads_per_worker(max(strategy.workers for strategy in settled))
    proofs = verify_each(source, settled, steps=steps, float64=dtype == "float64", threads=threads)
    document: dict[str, Any] = finite(verification(loaded.name, proofs, dtype))
    if path is not None:
        write_json(path, document)
    if page is not None:
        _write_page(page, "verify", document)
    return document


def simulate(
    workload: str | Workload | Callable[..., Workload],
    strategies: Sequence[str | Strategy],
    *,
    cluster: str,
    trace: str | Path | None = None,
    slow: Mapping[int, float] | None = None,
    dry_run: bool = False,
    runtime: str = "shardwise",
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    margin: float | None = None,
    bandwidth: float = 1.0,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Predict step time and memory of strategies on a cluster; nothing is trained and none of its devices is needed.

    Args:
        workload: as in `train`.
        strategies: strategies to predict. An impossible one is listed as rejected if another one is possible.
        cluster: devices of the catalogue (`h100x1024`, `dgx-a100`), or a cluster file.
        trace: file that gets the timelines of the steps for Perfetto and chrome://tracing; None: none is written. The
            steps are then simulated event by event instead of by the closed form.
        slow: rank -> factor by which its compute takes longer than usual; this also simulates the steps event by event.
        dry_run: also run a step of the real program of the worker that needs most memory, with fake workers and
            fake tensors. Each candidate then shows the observed messages and memory beside the predicted ones.
        runtime: software that trains the workload: `shardwise`, `megatron`, `torchtitan`, `deepspeed` or `accelerate`.
            For other software than Shardwise each candidate also has the command and the files that run it (`launch`).
        settings: parameters of the workload's function.
        seed: seed of weights, data order and dropout; None: the workload's own.
        margin: share of the memory usable on a device that has to stay free; None: 0.05.
        bandwidth: times the bandwidth of all links of the cluster, to see what faster or slower ones would do.
        report: file that gets the result as a page of HTML, with a what-if panel; None: none is written.

    Returns:
        The document that `shardwise simulate --json` prints.

    Raises:
        RequestError: the cluster or the workload is wrong, or every strategy is impossible.
    """
    from shardwise.cluster.find import find_cluster
    from shardwise.commands.request import settle_bandwidth, settle_file, settle_slow, settle_source, settle_strategy
    from shardwise.commands.what_if import with_all_bandwidths
    from shardwise.planner.launching.software import launch_document
    from shardwise.predict.simulate import simulation
    from shardwise.reports.perfetto import chrome_trace
    from shardwise.run.jsonfile import write_json
    from shardwise.run.training.log import finite

    settled = [settle_strategy(strategy, None) for strategy in strategies]
    if not settled:
        raise RequestError("nothing to predict: give a strategy, for example --strategy dp=8")
    path = None if trace is None else settle_file(Path(trace), "trace")
    page = None if report is None else settle_file(Path(report), "report")
    slowed = settle_slow(slow or {})
    found = with_all_bandwidths(find_cluster(cluster).with_margin(margin), settle_bandwidth(bandwidth))
    source = settle_source(workload, settings, seed)
    loaded = source.load()
    found = found.importing(loaded.libraries)
    simulated = simulation(loaded, settled, found, play=path is not None, slowed=slowed, dry=dry_run, runtime=runtime)
    if simulated.profiles.software is not None:
        for each in simulated.document["candidates"]:
            each["launch"] = launch_document(simulated.profiles, Strategy.parse(each["strategy"]), found)
    if path is not None:
        steps = {strategy: timeline.document() for strategy, timeline in simulated.timelines.items()}
        write_json(path, finite(chrome_trace(steps)))
    document: dict[str, Any] = finite(simulated.document)
    if page is not None:
        from shardwise.commands.predicted import write_predicted

        write_predicted(page, "simulate", document, simulated.profiles, found, source, cluster)
        document["report"] = str(page)
    return document


def plan(
    workload: str | Workload | Callable[..., Workload],
    *,
    cluster: str | None = None,
    workers: int | str | None = None,
    engine: str = "local",
    objective: str = "time",
    max_memory: str | None = None,
    fix: Sequence[str] = (),
    forbid: Sequence[str] = (),
    allow: Sequence[str] = (),
    out: str | Path | None = None,
    dry_run: bool = False,
    pareto: bool = False,
    runtime: str = "shardwise",
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    margin: float | None = None,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Find the best strategy for a workload on a cluster, and say why the others lost.

    Args:
        workload: as in `train`.
        cluster: as in `simulate`; None: this machine, as `calibrate` measured it.
        workers: number of devices to use; None: all devices of the cluster, but of workers that share the cores of a
            measured CPU no more than were measured to pay. `"1..64"` adds the scaling curve from 1 to 64 devices.
        engine: `slurm` plans for the allocation that this process is in: for as many workers as it has tasks. Its
            nodes must be as the cluster's.
        objective: quantity to minimize: `time`, `memory` or `money`.
        max_memory: memory limit of a device, for example `40GiB`; None: all that it has, less by the margin.
        fix: options that the strategy must have, for example `tp=8`.
        forbid: options that the strategy must not have, for example `pp`, `schedule=gpipe`.
        allow: how the strategy may change training: `lossy` (what is sent is compressed, or sent less often), `async`
            (workers do not wait for each other). By default every strategy computes what one process computes, and
            `means` of the document says what others would bring.
        out: path at which to write the best strategy as a plan file.
        dry_run: also run the real program of the finalists with fake workers and fake tensors, and reject those that
            need more memory than a device has. A small model takes seconds per finalist, a large one up to a minute.
        pareto: also search for the Pareto front of time and memory: the fastest strategy under each memory limit, in
            steps of a twentieth. Each limit takes a search of its own.
        runtime: software that is to train the workload: `shardwise`, `megatron`, `torchtitan`, `deepspeed` or
            `accelerate`. Only strategies that it can run are searched, priced as it runs them; `launch` of the document
            has the command and the files that run the chosen one.
        settings: parameters of the workload's function.
        seed: seed of weights, data order and dropout; None: the workload's own.
        margin: share of the memory usable on a device that has to stay free; None: 0.05.
        report: file that gets the plan as a page of HTML, with a what-if panel; None: none is written.

    Returns:
        The document that `shardwise plan --json` prints.

    Raises:
        RequestError: the cluster, the workload, the allocation or a constraint is wrong, or two constraints contradict
            each other.
        DoesNotFit: no strategy fits into the memory of the devices.
    """
    from shardwise.planner.garbage import few_collections

    with few_collections():  # an import of torch makes many objects that stay, too
        from shardwise.commands.plan import planned
        from shardwise.commands.request import settle_file, settle_source
        from shardwise.run.training.log import finite

    page = None if report is None else settle_file(Path(report), "report")
    source = settle_source(workload, settings, seed)
    document: dict[str, Any] = finite(
        planned(
            source,
            cluster,
            workers,
            engine=engine,
            objective=objective,
            max_memory=max_memory,
            fix=fix,
            forbid=forbid,
            allow=allow,
            out=None if out is None else Path(out),
            dry_run=dry_run,
            pareto=pareto,
            margin=margin,
            runtime=runtime,
            report=page,
        )
    )
    return document


def check_plan(
    path: str | Path, *, cluster: str | None = None, workload: str | None = None, margin: float | None = None
) -> dict[str, Any]:
    """Report whether a plan file still holds: its strategy is possible, fits, and costs as much as the file says.

    Args:
        path: path of the plan file.
        cluster: as in `plan`; None: the one that the plan was made for.
        workload: workload of the plan. It must be given if it is a function, because a plan file on its own must not
            run code.
        margin: as in `plan`.

    Returns:
        The document that `shardwise plan --check --json` prints: `holds`, and `reasons` if it does not hold.

    Raises:
        RequestError: the file cannot be read, its workload or cluster is wrong, or its workload is a function and is
            not given.
    """
    from shardwise.commands.plan import checked
    from shardwise.run.training.log import finite

    document: dict[str, Any] = finite(checked(Path(path), cluster, workload, margin))
    return document


def calibrate(
    out: str | Path = "cluster.toml",
    *,
    workers: int | None = None,
    quiet: bool = False,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Measure this machine for predictions, and write the measurements as a cluster file.

    The user's cache folder gets a copy, for the predictions of `train` and `compare`.

    Args:
        out: path of the cluster file.
        workers: largest number of local workers to measure with; None: 4 on a CPU, one for each GPU. Under an outer
            torchrun all of its workers measure, over all hosts.
        quiet: show no progress bar.
        report: file that gets the measurements as a page of HTML; None: none is written.

    Returns:
        The document that `shardwise calibrate --json` prints.

    Raises:
        RequestError: the machine cannot run that many workers, or the file cannot be written.
        WorkerFailed: a worker died.
    """
    from shardwise.cluster.toml_writer import check_place, write_cluster
    from shardwise.commands.request import settle_file
    from shardwise.run.calibration.calibrate import calibrate as measure
    from shardwise.run.calibration.calibrate import summary
    from shardwise.run.calibration.local_cluster import check_place as check_kept
    from shardwise.run.calibration.local_cluster import keep

    check_place(out)
    page = None if report is None else settle_file(Path(report), "report")
    begin = time.perf_counter()
    cluster = measure(workers, quiet=quiet)
    if cluster is None:  # under an outer launcher, only rank 0 gets the measurements
        return {"cluster": str(out)}
    write_cluster(cluster, out)
    try:
        check_kept()
    except NotMeasured as error:
        if not quiet:
            sys.stderr.write(f"{out} is written; {error}\n")
    else:
        keep(cluster)
    document = summary(cluster, Path(out), time.perf_counter() - begin)
    if page is not None:
        _write_page(page, "calibrate", document)
    return document


def validate(runs: str | Path, *, standing: bool = False, report: str | Path | None = None) -> dict[str, Any]:
    """Compare predictions with training runs that others measured and published.

    Args:
        runs: CSV file with one run per row and the columns of tests/published/README.md.
        standing: also predict what Shardwise itself would take for a few runs of each group, on the same machine with
            the same strategy. This traces their models and takes minutes.
        report: file that gets the result as a page of HTML; None: none is written.

    Returns:
        The document that `shardwise validate --json` prints; its errors are absolute values of relative errors.

    Raises:
        DataError: the file cannot be read, or none of its rows has all required fields.
    """
    from shardwise.predict.published.validate import validate as validate_runs

    if report is None:
        return validate_runs(runs, standing=standing)
    from shardwise.commands.request import settle_file

    page = settle_file(Path(report), "report")
    document = validate_runs(runs, standing=standing)
    _write_page(page, "validate", document)
    return document


def report(runs: str | Path | Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """Write a page of HTML about one or several runs or comparisons, from their files alone.

    The page needs no network and no server. Runs that are still going on or have crashed are shown as far as they came;
    what is missing is said.

    Args:
        runs: folder of a run or of a comparison, or several.
        out: the file to write.

    Returns:
        The path of the page.

    Raises:
        RunFolderError: a folder holds no run, or the page cannot be written.
    """
    from shardwise.commands.report import runs_document, write_report
    from shardwise.commands.request import settle_file

    path = settle_file(Path(out), "out")
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    if not folders:
        raise RequestError("nothing to report: give the folder of a run")
    write_report(path, runs_document([Path(folder) for folder in folders]))
    return path


def watch(run: str | Path, *, every: float = 1.0) -> Iterator[dict[str, Any]]:
    """Return an iterator over the states of a run: its state now, and again every few seconds until the run has ended.

        for state in watch("runs/digits"):
            print(state["step"], state["loss"])

    `next(watch(run))` is the state now. Only files of the run's folder are read: this works while the run goes on, from
    another process or machine, and after it ended in whatever way.

    Args:
        run: the run's folder.
        every: seconds between two states.

    Returns:
        The documents that `shardwise watch --json` prints. `state` is `starting` (no step yet), `running`; `finished`,
        `stopped` (by a signal), `interrupted` (Ctrl-C), `failed` (`text` has the error), `killed` (ended without a
        word); or `unknown`, if the file system has no locks. Values that are not known are None. Times of steps are
        medians over the last 100; `losses` has means over equally long parts of the run; `busy_seconds` has the seconds
        of a step in which each rank does not wait for others, by rank.

    Raises:
        RunFolderError: the folder holds no run.
        RequestError: `every` is not above 0.
    """
    from shardwise.run.live.follower import Follower

    if not 0 < every <= LONGEST_PAUSE:
        raise RequestError(f"every={every:g}: must be a number of seconds above 0, at most {LONGEST_PAUSE:g}")
    return Follower(Path(run)).states(every)


def export(run: str | Path, out: str | Path, form: str = "file", *, best: bool = False) -> None:
    """Write the plain full weights of a run's newest checkpoint.

    Args:
        run: the run's folder.
        out: file or folder to write, which must not exist.
        form: `file`: one safetensors file. For runs of a Hugging Face folder also `folder`: a folder that transformers
            loads, with adapters merged into the weights; `adapter`: the adapters alone, as peft loads them.
        best: take the checkpoint at which the metric of the workload's first evaluation was best.

    Raises:
        RequestError: `form` is something else.
        RunFolderError: there is no run in the folder `run`, it is of another kind or has no best checkpoint, or `out`
            exists.
        CheckpointError: the run has no complete, undamaged checkpoint.
    """
    if form not in EXPORT_FORMS:
        raise RequestError(f"form={form}: known are {', '.join(EXPORT_FORMS)}{nearest(form, EXPORT_FORMS)}")
    if form == "file":
        from shardwise.run.checkpoint.export import export_safetensors

        export_safetensors(Path(run), Path(out), best=best)
        return
    from shardwise.run.checkpoint.export_folder import export_adapter, export_folder

    (export_folder if form == "folder" else export_adapter)(Path(run), Path(out), best=best)


def _write_page(path: Path, kind: str, document: dict[str, Any]) -> None:
    """Write the page of a command's document, and name it in the document. Raises RunFolderError."""
    from shardwise.commands.report import command_document, write_report

    write_report(path, command_document(kind, document))
    document["report"] = str(path)


def _folder_in(parent: Path, workload: Workload, job: Job) -> Path:
    from shardwise.commands.request import settle_folder

    return settle_folder(parent / str(job.strategy).replace("=", "").replace(",", "-"), workload, job)


def _trained_model(workload: Workload, job: Job, trained: Trained) -> TrainedModel:
    """Build the result with the plain trained module; under an outer launcher each worker gets one."""
    from shardwise.commands.weights import filled_model

    return TrainedModel(
        model=filled_model(workload, trained.weights),
        metrics=trained.summary["metrics"],
        history=[asdict(step) for step in trained.steps],
        summary=trained.summary,
        run=job.folder,
    )
