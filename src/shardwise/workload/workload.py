"""The workload: a frozen value that names a plain model, its loss, its data and its optimizer.

It says nothing about parallelism. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.errors import WorkloadError
from shardwise.options import PRECISIONS
from shardwise.workload.evaluation import Evaluation as Evaluation
from shardwise.workload.evaluation import Stopping as Stopping
from shardwise.workload.evaluation import check_evaluations
from shardwise.workload.loading import Loading
from shardwise.workload.turns import Turn as Turn
from shardwise.workload.turns import checked_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler

    Losses = Any  # a scalar tensor, or a dict of scalar tensors by name
    Batch = Any  # a tensor, or a tuple, list or dict of tensors, samples along the first dimension


CALLED = ("on_step", "on_evaluation")
"""Methods of a callback."""

MOST_EPOCHS = 1e9
"""Upper limit of `Workload.epochs`."""


def not_given(*_: Any) -> Any:
    """Stand for a function that a workload does not have. Raises WorkloadError if it is called."""
    raise WorkloadError("the workload has a step, but no inputs and loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """Weights that a model starts from.

    Attributes:
        path: safetensors file, or folder with `model.safetensors` or several files and their index.
        allow_missing: patterns (`head.*`) of names, as in the model, that only the model or only the file may have, or
            that may have another shape: those of a new head. The model's own values stay.
        prefix: start of the names in the model (`encoder.`) that the names in the file lack.
    """

    path: str | Path
    allow_missing: tuple[str, ...] = ()
    prefix: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.allow_missing, str):
            raise WorkloadError(f"allow_missing={self.allow_missing!r}: must be a tuple of patterns, not one text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, its loss, its data, its optimizer and the global batch size.

    Attributes:
        name: name in runs and reports.
        model: builds the plain `nn.Module`; called on each worker with the random seed set.
        dataset: map-style (`__len__`, `__getitem__`) or iterable; samples are tensors, tuples or dicts of tensors. A
            method `set_epoch` of it is called with the number of each epoch.
        inputs: maps a batch to the arguments of the model: a tensor, a tuple (args) or a dict (kwargs).
        loss: maps (model output, batch) to a scalar tensor, the mean over the samples of `batch` (or over its
            `weight`), or to a dict of such tensors: their sum is trained, each is logged. A module with parameters is
            trained with the model.
        step: training step of one's own: maps (model, batch) to losses, as `loss` returns them, by any number of calls
            of the model or of parts of it. Training uses it in place of `inputs` and `loss`, which may then be left
            out; an evaluation needs them. A list of `Turn` trains some of the parameters in each turn, one after the
            other on one batch, each update before the next turn; `optimizer` is then given groups, none of two turns.
        optimizer: maps parameters to a torch optimizer, or to a list of them that each hold some of the parameters.
        batch_size: samples per optimizer step over all workers.
        weight: maps a batch to the total weight that the loss averages over, if that is not the number of samples: for
            example the tokens that are not padding. The global loss and gradient are then the true weighted mean.
        collate: maps a list of samples to a batch. None means torch's default.
        loading: order of the samples (shuffle, sampler, batch sampler, last batch), and number of loading processes.
        schedule: maps an optimizer to a learning-rate scheduler, which is stepped as `schedule_every` says.
        schedule_every: when the schedule is stepped: after each optimizer `step`, after each `epoch`, or after each
            epoch with a `metric` of its first evaluation (`ReduceLROnPlateau`).
        groups: options of each parameter in the optimizer, such as {"weight_decay": 0.0} for some: a function of (name,
            parameter) that returns them, or a dict of name patterns (`*.bias`) to options. The optimizer is then given
            groups of parameters in place of parameters. The function must not look at a parameter's values.
        evaluation: held-out data and a named metric; or several evaluations, each with its own name. The best
            checkpoint by the metric of the first is kept.
        clip_norm: largest global norm of the gradient. None means no clipping.
        precision: `float32`, `bf16` or `autocast`, see `workload.precision`; a strategy's own takes precedence.
        float32: names of modules and parameters (`router`, patterns such as `*.norm`) that compute in float32 in `bf16`
            and `autocast` too; see `workload.precision`.
        seed: seed of the weights, the order of the data and dropout.
        whole_batch: the loss needs the outputs of the whole batch, because it couples its samples (contrastive losses,
            batch Dice). Every replica then computes it from the outputs of all.
        epochs: passes over the dataset if a command gives neither steps nor epochs; may have a fraction.
        stop: rule that ends the training early by a value of an evaluation.
        average: decay of an exponential moving average of the weights, 0 to 1, for example 0.999; it is evaluated and
            exported in place of the weights, which are trained on. None means no average.
        after_step: function of (parameter name, tensor) that is called without gradients after each update for each
            trained parameter, and may change the tensor in place: clipping, a projection, a mask.
        callbacks: objects that worker 0 tells what happens, each with one or both of the methods `on_step(step)`, with
            a step as in `metrics.jsonl`, and `on_evaluation(step, values)`, with the number of steps taken.
        weights: safetensors file or folder that the model starts from; a `WarmStart` says what may differ.
        libraries: packages beside torch that the model's code imports in every worker; those that were measured
            (`transformers`) count in predictions of a worker's memory.
        notes: lines that the log and the summary of a training show, for example where its weights come from.
    """

    name: str
    model: Callable[[], torch.nn.Module]
    dataset: Any
    inputs: Callable[[Batch], Any] = not_given
    loss: Callable[[Any, Batch], Losses] = not_given
    optimizer: Callable[[Iterable[torch.nn.Parameter]], Any]
    batch_size: int
    step: Callable[[Any, Batch], Losses] | Sequence[Turn] | None = None
    weight: Callable[[Batch], Any] | None = None
    collate: Callable[[list[Any]], Batch] | None = None
    loading: Loading = field(default_factory=Loading)
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    schedule_every: str = "step"
    groups: Callable[[str, torch.nn.Parameter], Mapping[str, Any]] | Mapping[str, Mapping[str, Any]] | None = None
    evaluation: Evaluation | Sequence[Evaluation] | None = None
    clip_norm: float | None = None
    precision: str = "float32"
    float32: Sequence[str] = ()
    seed: int = 0
    whole_batch: bool = False
    epochs: float = 1
    stop: Stopping | None = None
    average: float | None = None
    after_step: Callable[[str, Tensor], Any] | None = None
    callbacks: Sequence[Any] = ()
    weights: str | Path | WarmStart | None = None
    libraries: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise WorkloadError(f"batch_size={self.batch_size}: must be 1 or more")
        if self.precision not in PRECISIONS:
            raise WorkloadError(f"precision={self.precision}: known are {', '.join(PRECISIONS)}")
        if isinstance(self.float32, str) or not all(isinstance(each, str) for each in self.float32):
            raise WorkloadError(f"float32={self.float32!r}: must be a tuple of names or patterns")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise WorkloadError(f"clip_norm={self.clip_norm}: must be above 0, or None for no clipping")
        if self.average is not None and not (isinstance(self.average, int | float) and 0 <= self.average <= 1):
            raise WorkloadError(f"average={self.average}: must be a decay from 0 to 1, or None for no average")
        if self.whole_batch and self.weight is not None:
            raise WorkloadError("whole_batch and weight exclude each other: such a loss averages over the batch itself")
        if type(self.epochs) not in (int, float) or not 0 < self.epochs < MOST_EPOCHS:
            raise WorkloadError(f"epochs={self.epochs}: must be a number above 0 and below {MOST_EPOCHS:g}")
        check_evaluations(self.evaluations, self.stop)
        self._check_callbacks()
        self._check_schedule()
        if self.after_step is not None and not callable(self.after_step):
            raise WorkloadError(f"after_step of workload {self.name!r} must be a function, not {self.after_step!r}")
        for name in ("model", "inputs", "loss", "optimizer"):
            if not callable(getattr(self, name)):
                raise WorkloadError(f"{name} of workload {self.name!r} must be a function, not {getattr(self, name)!r}")
        self._check_step()

    def _check_step(self) -> None:
        missing = [name for name in ("inputs", "loss") if getattr(self, name) is not_given]
        if self.step is None:
            if missing:
                raise WorkloadError(f"workload {self.name!r} has no {missing[0]}: give inputs and loss, or a step")
            return
        if isinstance(self.step, (list, tuple)):
            checked_turns(self.name, self.step)
        elif not callable(self.step):
            raise WorkloadError(f"step of workload {self.name!r} must be a function, not {self.step!r}")
        if self.whole_batch:
            raise WorkloadError(
                f"whole_batch and step of workload {self.name!r} exclude each other: it joins the outputs of a model "
                "for its loss, and a step has neither; train on one replica, with tp or pp"
            )
        if self.evaluation is not None and missing:
            raise WorkloadError(
                f"evaluation of workload {self.name!r} needs {' and '.join(missing)}: a step is for training alone"
            )

    def _check_schedule(self) -> None:
        if self.schedule_every not in ("step", "epoch", "metric"):
            raise WorkloadError(f"schedule_every={self.schedule_every}: known are step, epoch, metric")
        if self.schedule is None and self.schedule_every != "step":
            raise WorkloadError(f"schedule_every={self.schedule_every} needs a schedule, and there is none")
        if self.groups is not None and not callable(self.groups) and not isinstance(self.groups, Mapping):
            raise WorkloadError(
                f"groups of workload {self.name!r} must be a function of (name, parameter) or a dict of patterns, not "
                f"{self.groups!r}"
            )

    def _check_callbacks(self) -> None:
        if not isinstance(self.callbacks, Sequence) or isinstance(self.callbacks, str):
            raise WorkloadError(f"callbacks must be a list of objects, not {self.callbacks!r}")
        for callback in self.callbacks:
            if not any(callable(getattr(callback, name, None)) for name in CALLED):
                raise WorkloadError(f"callback {type(callback).__name__} has none of the methods {', '.join(CALLED)}")

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Return the turns of a training step, in order; empty for a step that updates all parameters at once."""
        return tuple(self.step) if isinstance(self.step, (list, tuple)) else ()

    @property
    def steps(self) -> tuple[Callable[[Any, Batch], Losses], ...]:
        """Return the functions of a training step of one's own: one, or one of each turn; empty without such a step."""
        if callable(self.step):
            return (self.step,)
        return tuple(turn.step for turn in self.turns)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Return all evaluations, in order."""
        if self.evaluation is None:
            return ()
        if isinstance(self.evaluation, Sequence) and not isinstance(self.evaluation, str):
            return tuple(self.evaluation)
        return (self.evaluation,)


def call_model(model: Any, inputs: Any) -> Any:
    """Call `model` with the result of `Workload.inputs`: a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)
