"""Verification that a parallel run equals training on one worker: identical steps are taken in both and compared.

one worker:  initial weights, then per step loss, gradients, weights -> files
in parallel: the same steps from the same initial weights; rank 0 gathers full tensors and compares with the files
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwise.errors import WorkloadError
from shardwise.launch import watch
from shardwise.launch.local import enough_gpus, run_local
from shardwise.launch.sending import written
from shardwise.parallel.tensor.partitioner import Uncut
from shardwise.run.training.streams import agreeing
from shardwise.run.verification.deviation import NO_PROOF, Deviation, deviation, loss_deviation, same_data, typical_size
from shardwise.run.verification.rounding import rounding
from shardwise.strategy import Strategy
from shardwise.workload.float64 import in_float64
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

OPTIONS = {
    "zero": "fsdp",
    "offload": "fsdp",
    "reduce": "dp fsdp",
    "compress": "dp fsdp",
    "plain_steps": "dp fsdp",
    "bucket": "dp",
    "sp": "tp",
    "schedule": "pp",
    "stages": "pp",
    "speeds": "pp",
    "ps": "dp",
    "staleness": "dp",
    "shares": "",
    "outermost": "",
    "local": "dp",
    "outer": "dp",
    "fragments": "dp",
    "delay": "dp",
}
"""Option -> the axes that it can be tried with alone."""

COMPRESSED = 3
"""Steps whose gradients are compressed for a proof; from the second on there are errors to feed back."""

DELAYED = 4
"""Least steps of a proof of delayed updates: the first has none, and the fourth uses a gradient at other weights."""

CONSERVED = (
    "steps are compared with gradients that replicas join exactly; compressed ones, with what is owed after them, add "
    "up to the exact ones"
)
"""Note of a proof of a strategy that compresses gradients."""

TELLING = 1e-3
"""Least gradient of an element, relative to the typical one, for which its update is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyTrial:
    """Trial of one strategy; all workers receive equal ones.

    Attributes:
        source: source of the workload.
        strategy: strategy with its number of microbatches settled.
        steps: number of optimizer steps.
        float64: True to compute in double precision.
        folder: folder with the steps of one worker.
    """

    source: Source
    strategy: Strategy
    steps: int
    float64: bool
    folder: str

    def load(self) -> Workload:
        """Load the workload in the precision of the trial."""
        workload = self.source.load()
        return in_float64(workload) if self.float64 else workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Result of verifying a strategy: the largest errors over the steps, compared with one worker.

    Attributes:
        strategy: strategy that was verified.
        steps: number of optimizer steps.
        loss: largest error of the losses.
        gradient: largest error of the gradients.
        parameter: largest error of the updated parameters and buffers.
        tolerance: largest error that counts as rounding.
        sharded_share: share of the parameters that are sharded, 0 to 1.
        uncut: parameters that tensor parallelism leaves whole, grouped by reason.
        cut_points: number of cut points of the step; None without pipeline.
        notes: notes of all workers for the user.
    """

    strategy: Strategy
    steps: int
    loss: Deviation
    gradient: Deviation
    parameter: Deviation
    tolerance: float
    sharded_share: float
    uncut: tuple[Uncut, ...]
    cut_points: int | None
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Return whether every error is within the tolerance."""
        return all(each.error <= self.tolerance for each in (self.loss, self.gradient, self.parameter))

    @property
    def tells(self) -> bool:
        """Return whether the failure is due to parallelism: False if one worker's numbers are not finite either."""
        whys = (self.loss.why, self.gradient.why, self.parameter.why)
        return not self.passed and not any(why.endswith(NO_PROOF) for why in whys)


def verify(
    source: Source, strategies: Sequence[Strategy], *, steps: int, float64: bool, threads: int
) -> list[tuple[Proof, str]]:
    """Verify strategies one by one, and return for each its proof and the axis most likely at fault.

    The axis is empty for a strategy that passes.

    Raises:
        WorkloadError: the dataset does not give equal samples each time.
        WorkerFailed: a worker died.
    """
    with tempfile.TemporaryDirectory(prefix="shardwise-verify-") as folder:
        prover = _Prover(source, steps, float64, threads, Path(folder))
        proofs = prover.prove(strategies)
        return [(proof, prover.blame(proof.strategy) if proof.tells else "") for proof in proofs]


def verification(workload: str, proofs: Sequence[tuple[Proof, str]], dtype: str) -> dict[str, Any]:
    """Return the document that `verify --json` prints; for errors that are not finite, `failure` gives the reason."""
    return {
        "workload": workload,
        "dtype": dtype,
        "workers": max(proof.strategy.workers for proof, _ in proofs),
        "results": [_row(proof, axis) for proof, axis in proofs],
    }


def _row(proof: Proof, axis: str) -> dict[str, Any]:
    return {
        "strategy": str(proof.strategy),
        "workers": proof.strategy.workers,
        "steps": proof.steps,
        "loss_error": proof.loss.error,
        "gradient_error": proof.gradient.error,
        "parameter_error": proof.parameter.error,
        "worst_gradient": proof.gradient.tensor,
        "worst_parameter": proof.parameter.tensor,
        "tolerance": proof.tolerance,
        "sharded_parameter_share": proof.sharded_share,
        "passed": proof.passed,
        "failure": None if proof.passed else _failure(proof, axis),
        "axis_at_fault": axis or None,
        "uncut": [{"reason": e.reason, "parameters": list(e.names), "share": e.share} for e in proof.uncut],
        "pipeline_places": proof.cut_points,
        "notes": list(proof.notes),
    }


def _failure(proof: Proof, axis: str) -> str:
    """Describe the first failed comparison in the order gradient, parameter, loss."""
    for kind, found in (("gradient of", proof.gradient), ("", proof.parameter), ("loss of", proof.loss)):
        if not found.error <= proof.tolerance:
            what = f"{kind} {found.tensor}".strip()
            how = found.why or f"differs by {found.error:.1e}, more than {proof.tolerance:.1e}"
            return f"{what} {how}" + (f"; most likely at fault: {axis}" if axis else "")
    raise AssertionError("a proof that holds")


class _Prover:
    """Runner of trials; it records one worker's steps once for all strategies with equal microbatches and precision."""

    def __init__(self, source: Source, steps: int, float64: bool, threads: int, folder: Path) -> None:
        self._trial = StrategyTrial(source=source, strategy=Strategy(), steps=steps, float64=float64, folder="")
        self._threads = threads
        self._folder = folder
        self._batch_size = source.load().batch_size
        self._recorded: set[Strategy] = set()
        self._gpus: bool | None = None

    def prove(self, strategies: Sequence[Strategy]) -> list[Proof]:
        """Return a proof for each strategy; strategies with equal numbers of workers share processes, one by one."""
        settled = [_shortened(each.for_batch(self._batch_size), self._trial.steps) for each in strategies]
        if self._gpus is None:  # the same for one worker as for all: a GPU rounds otherwise than a CPU
            self._gpus = enough_gpus(max(each.workers for each in settled))
        alone = [each if each.local or each.delayed else _on_one_worker(each) for each in settled]
        missing = [each for each in dict.fromkeys(alone) if each not in self._recorded]
        if missing:
            self._run(record_all, [self._trial_of(each, each) for each in missing], workers=1)
            self._recorded.update(missing)
        proofs: dict[int, Proof] = {}
        for count in sorted({each.workers for each in settled}):
            chosen = [index for index, each in enumerate(settled) if each.workers == count]
            trials = [self._trial_of(settled[i], alone[i]) for i in chosen]
            proofs.update(zip(chosen, self._run(compare_all, trials, workers=count), strict=True))
        return [replace(proofs[index], strategy=strategy) for index, strategy in enumerate(strategies)]

    def blame(self, strategy: Strategy) -> str:
        """Return the first axis that fails without the others. If each passes alone, return all of them as one text."""
        degrees = {axis: getattr(strategy, axis) for axis in ("dp", "fsdp", "tp", "pp") if getattr(strategy, axis) > 1}
        if len(degrees) < 2:
            return next(iter(degrees), "")
        count = strategy.for_batch(self._batch_size).microbatches
        for axis in degrees:
            others = {other: 1 for other in degrees if other != axis}
            alone = strategy.with_(**others, **_without_options(axis), microbatches=count)
            if not self.prove([alone])[0].passed:
                return axis
        return " with ".join(degrees)

    def _trial_of(self, strategy: Strategy, alone: Strategy) -> StrategyTrial:
        """Return the trial of a strategy; the steps of `alone`, recorded on one worker, have a folder by its name.

        Local steps are tried until each part of the parameters has been averaged, delayed updates until one has used
        the gradient at weights that an update had made.
        """
        steps = max(self._trial.steps, strategy.local + strategy.delay, DELAYED if strategy.delayed else 0)
        return replace(self._trial, strategy=strategy, steps=steps, folder=str(self._folder / str(alone)))

    def _run(self, function: Any, trials: Sequence[StrategyTrial], *, workers: int) -> Any:
        sent = [written(trial) for trial in trials]
        return run_local(watched, (function, sent), workers=workers, threads=self._threads, gpus=bool(self._gpus))


def _without_options(axis: str) -> dict[str, Any]:
    """Return the options of all axes except `axis`, with their default values."""
    default = Strategy()
    return {option: getattr(default, option) for option, axes in OPTIONS.items() if axis not in axes.split()}


# ---- functions that workers run -------------------------------------------------------------------------------------


def watched(function: Callable[[Sequence[bytes]], Any], trials: Sequence[bytes]) -> Any:
    """Call `function(trials)` under the watch that notices hanging workers, and return its result."""
    torch.backends.cudnn.allow_tf32 = False  # ten bits of a float32 would hide what goes wrong
    with watch.watching(watch.limits(None, None)):
        return function(trials)


def record_all(trials: Sequence[bytes]) -> None:
    """Call `record` for each trial, one after the other."""
    for _ in map(record, _read(trials)):
        pass


def compare_all(trials: Sequence[bytes]) -> list[Proof | None]:
    """Call `compare` for each trial, one after the other, and return the proofs. Collective."""
    return [compare(trial) for trial in _read(trials)]


def _read(trials: Sequence[bytes]) -> Iterator[StrategyTrial]:
    """Unpickle the trials one by one, each with a workload of its own: a trial cannot change another one's dataset."""
    for trial in trials:
        yield cloudpickle.loads(trial)
        gc.collect()  # the parts of a program refer to each other in cycles


def record(trial: StrategyTrial) -> None:
    """Run the steps of a trial on one worker, and save loss, gradients and weights of each to files.

    Replicas that take local steps are played one after the other. For pipelines that do not wait for the end of a step
    each update uses the gradient of the step before.
    """
    from shardwise.parallel.program import Program

    if trial.strategy.local:
        _record_replicas(trial)
        return
    program = Program.build(trial.load(), _on_one_worker(trial.strategy))
    if trial.strategy.delayed:
        delay_updates(program)
    folder = Path(trial.folder)
    folder.mkdir(exist_ok=True)
    _check_repeatable(program)
    save_file(_model(program), folder / "initial.safetensors")
    for step, share in enumerate(_shares(program, trial.steps)):
        loss = program.step_share(share)
        gradients = {
            f"gradient/{piece.name.partition('/')[2]}": piece.local.cpu() for piece in program.gradient_pieces()
        }
        tensors = {**gradients, **_model(program), "loss": loss.cpu().double()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"step-{step}.safetensors")


def _record_replicas(trial: StrategyTrial) -> None:
    """Play the replicas of a trial, and save their mean loss, gradient and weights after each step, and each one's.

    `least/<name>` has the smallest size of each element of their gradients.
    """
    from shardwise.run.verification.replicas import PlayedReplicas, mean_of

    replicas = PlayedReplicas(trial.load(), trial.strategy)
    folder = Path(trial.folder)
    folder.mkdir(exist_ok=True)
    _check_repeatable(replicas.programs[0])
    save_file(_model(replicas.programs[0]), folder / "initial.safetensors")
    epochs = itertools.chain.from_iterable(replicas.shares(epoch) for epoch in itertools.count())
    for step, shares in enumerate(itertools.islice(epochs, trial.steps)):
        loss, gradients, tensors = replicas.step(shares), replicas.gradients(), replicas.tensors()
        saved = {f"gradient/{name}": each for name, each in mean_of(gradients).items()}
        for name in list(saved):
            given = [each[name.partition("/")[2]].abs() for each in gradients if name.partition("/")[2] in each]
            saved[f"least/{name.partition('/')[2]}"] = torch.stack(given).amin(0)
        saved |= {f"model/{name}": each for name, each in mean_of(tensors).items()}
        for number, own in enumerate(tensors):
            saved |= {f"replica/{number}/model/{name}": each for name, each in own.items()}
        saved["loss"] = torch.tensor(loss, dtype=torch.float64)
        written = {name: each.detach().cpu().contiguous() for name, each in saved.items()}
        save_file(written, folder / f"step-{step}.safetensors")


def delay_updates(program: Any) -> None:
    """Let each update of a program on one worker use the gradient of the step before; the first step has none."""
    update, kept = program._update.step, list[dict[str, Tensor | None]]()

    def later(turn: int = 0) -> None:
        parameters = program.engine.parameters
        kept.append({name: parameter.grad for name, parameter in parameters.items()})
        before = kept.pop(0) if kept[1:] else {}
        for name, parameter in parameters.items():
            parameter.grad = before.get(name)
        if before:
            update(turn)

    program._update.step = later


def _on_one_worker(strategy: Strategy) -> Strategy:
    """Return the strategy of one worker that computes as a strategy does: in its microbatches and precision."""
    return Strategy(microbatches=strategy.microbatches, precision=strategy.precision)


def _shortened(strategy: Strategy, steps: int) -> Strategy:
    """Return a strategy whose local steps end within `steps` steps, as far as its fragments allow."""
    if not strategy.local:
        return strategy
    every = max(1, min(strategy.local, steps) // strategy.fragments)
    local = min(strategy.local, every * strategy.fragments)
    return strategy.with_(local=local, delay=min(strategy.delay, local - 1))


def _promised(strategy: Strategy) -> tuple[str, ...]:
    """Return what the comparison of changed updates says, and what it does not; nothing for other strategies."""
    if strategy.delayed:
        return (
            "stages do not wait for the end of a step: compared with one process whose updates use the gradient of the "
            "step before, at weights one step old; it is not the training of schedule=1f1b",
        )
    if not strategy.local:
        return ()
    return (
        f"replicas take local steps: compared with one process that plays the {strategy.dp} replicas one after the "
        f"other, averages after every {strategy.local} steps; it is not the training of data parallelism",
    )


def compare(trial: StrategyTrial) -> Proof | None:
    """Run the steps of a trial in parallel, and compare each with one worker's. Collective.

    Each step starts from the weights of one worker, so that rounding errors of one step do not carry over to the next.
    Returns the proof on rank 0, None on other ranks.
    """
    from shardwise.parallel.program import Program

    strategy = trial.strategy.with_(plain_steps=0)
    program = Program.build(trial.load(), strategy)
    program.engine.position.exact = bool(strategy.compress)
    folder = Path(trial.folder)
    _start_from(program, load_file(folder / "initial.safetensors"))
    tolerance = rounding(program, next(_shares(program, 1)), float64=trial.float64)
    loss = gradient = parameter = Deviation()
    for step, share in enumerate(_shares(program, trial.steps)):
        value = float(program.step_share(share))
        expected = load_file(folder / f"step-{step}.safetensors")
        alone = float(expected.pop("loss"))
        if strategy.delayed and step:  # the loss of the step before is told
            alone = float(load_file(folder / f"step-{step - 1}.safetensors")["loss"])
        counted = _told(_kind(expected, "gradient"), tolerance, _kind(expected, "least"))
        loss |= loss_deviation(value, alone, f"step {step + 1}")
        gradient |= _of_all(program, program.means(program.gradient_pieces()), expected, "gradient", None)
        parameter |= _of_all(program, program.means(program.model_pieces()), expected, "model", counted)
        _start_from(program, _own(program, expected))
    program.meet()
    notes = (*_promised(trial.strategy), *_everybodys_notes(program))
    if strategy.compress:
        gradient |= _conserved(program)
        notes = (*notes, CONSERVED)
    if program.mesh.rank != 0:
        return None
    return Proof(
        strategy=trial.strategy,
        steps=trial.steps,
        loss=loss,
        gradient=gradient,
        parameter=parameter,
        tolerance=tolerance,
        sharded_share=float(getattr(program.engine, "sharded_parameter_share", 0.0)),
        uncut=tuple(getattr(program.engine, "uncut", ())),
        cut_points=getattr(program.engine, "cut_points", None),
        notes=notes,
    )


def _conserved(program: Any) -> Deviation:
    """Compare exact gradients with compressed ones and what is owed then, less what was owed before. Collective."""
    found = Deviation()
    for share in _shares(program, COMPRESSED):
        with program.tried(share, share.samples):
            exact = _gathered(program, program.gradient_pieces())
        before = _gathered(program, program.pieces(), "owed")
        with program.tried(share, share.samples, exact=False):
            sent = _gathered(program, program.gradient_pieces())
        after = _gathered(program, program.pieces(), "owed")
        if exact is not None and sent is not None and before is not None and after is not None:
            kept = {name: each + after[name] - before[name] if name in after else each for name, each in sent.items()}
            found |= deviation(kept, exact)
    return found


def _gathered(program: Any, pieces: Sequence[Any], kind: str = "gradient") -> dict[str, Tensor] | None:
    """Gather the full tensors of a kind by plain name on rank 0. Returns None elsewhere. Collective."""
    from shardwise.parallel.state.gather import gather_full

    chosen = [piece for piece in pieces if piece.name.startswith(f"{kind}/")]
    full = gather_full(chosen, program.mesh.world, program.mesh.device)
    return None if full is None else _kind(full, kind)


def _everybodys_notes(program: Any) -> tuple[str, ...]:
    """Gather the notes of all workers, each line once. Collective."""
    from shardwise.parallel.state.gather import gather_json

    mine = list(program.notes)
    if program.mesh.world is None:
        return tuple(mine)
    everybodys = gather_json(mine, program.mesh.world, program.mesh.device)
    return tuple(dict.fromkeys(note for notes in everybodys for note in notes))


def _shares(program: Any, steps: int) -> Any:
    """Yield the shares of the first `steps` steps, from as many epochs as needed."""
    left, epoch = steps, 0
    loader = agreeing(program)
    while left > 0:
        for share in loader.shares(epoch):
            yield share
            left -= 1
            if left == 0:
                return
        epoch += 1


def _model(program: Any) -> dict[str, Tensor]:
    return {piece.name: piece.local.cpu().contiguous() for piece in program.model_pieces()}


def _kind(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}


def _start_from(program: Any, initial: dict[str, Tensor]) -> None:
    """Copy this worker's parts of full tensors into the model; names that are not in `initial` stay unchanged."""
    with torch.no_grad():
        for piece in program.model_pieces():
            if piece.name in initial:
                piece.local.copy_(piece.layout.cut(initial[piece.name]))
    program.parameters_written()


def _own(program: Any, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of this worker's replica, where each replica has its own."""
    own = f"replica/{program.mesh.coordinate('dp')}/"
    return expected | {n.removeprefix(own): each for n, each in expected.items() if n.startswith(own)}


def _told(gradients: dict[str, Tensor], tolerance: float, sizes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return masks of the elements whose gradient is large enough for their update to be compared.

    `sizes` are those of their smallest gradient, if several replicas have updated them.

    An optimizer that divides by the gradient's size (Adam) amplifies tiny gradients: the update of such an element
    shows rounding errors, not errors of the parallel run. Its gradient is compared nevertheless.
    """
    least = max(tolerance, TELLING) * typical_size(gradients)
    return {name: sizes.get(name, gradient.abs()) > least for name, gradient in gradients.items()}


def _of_all(
    program: Any, pieces: Sequence[Any], expected: dict[str, Tensor], kind: str, counted: dict[str, Tensor] | None
) -> Deviation:
    """Return the largest deviation of the full tensors, and of every copy of a part on any worker. Collective."""
    from shardwise.parallel.state.gather import gather_full, gather_json

    alone = _kind(expected, kind)
    typical = typical_size(alone)
    full = gather_full(pieces, program.mesh.world, program.mesh.device)
    found = Deviation() if full is None else deviation(_kind(full, kind), alone, counted=counted)
    copies = [piece for piece in pieces if not piece.writes and piece.name.partition("/")[2] in alone]
    for piece in copies:
        name = piece.name.partition("/")[2]
        mask = counted and counted.get(name)
        found |= deviation(
            {name: piece.local.cpu()},
            {name: piece.layout.cut(alone[name])},
            counted=None if mask is None else {name: piece.layout.cut(mask)},
            typical=typical,
        )
    if program.mesh.world is None:
        return found
    everybody = gather_json([found.error, found.tensor, found.why], program.mesh.world, program.mesh.device)
    return max((Deviation(*each) for each in everybody), key=lambda each: each.error)


def _check_repeatable(program: Any) -> None:
    """Check that the dataset gives equal samples when it is read twice. Raises WorkloadError."""
    first, second = (next(iter(program.loader().shares(0))) for _ in "12")
    if not same_data(first, second):
        raise WorkloadError(
            f"the dataset of workload {program.workload.name!r} gives other samples each time it is read: two runs can "
            "only be compared on the same data; seed what it draws by the index of the sample"
        )
