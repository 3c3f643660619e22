"""Results of a training: plain values that travel from the workers to their parent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from shardwise.predict.prediction import Prediction


@dataclass(frozen=True, slots=True)
class Forecast:
    """Prediction of one optimizer step, made before the run.

    Attributes:
        seconds: seconds of a step; None without a prediction.
        memory_bytes: memory of the worker that needs most, as a run measures it (`Memory.allocated`); None without a
            prediction.
        reason: why there is no prediction; empty if there is one.
        details: the whole prediction for reports, see `commands.forecast.details`; empty without a prediction.
    """

    seconds: float | None = None
    memory_bytes: int | None = None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, prediction: Prediction, details: Mapping[str, Any] | None = None) -> Forecast:
        """Return the forecast of a step that was predicted."""
        return cls(prediction.step_seconds, prediction.memory.allocated, details=details or {})


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """Return predicted / measured - 1. Returns None if one of them is not known."""
    return predicted / measured - 1.0 if predicted is not None and measured else None


@dataclass(frozen=True, slots=True)
class FirstStep:
    """Comparison of the first step with that of one process, made before the training begins.

    Attributes:
        proved: whether the step equals that of one process, up to rounding.
        loss_error: relative error of the loss; None if it was not compared.
        gradient_error: largest relative error of a parameter's gradient; None if they were not compared.
        seconds: seconds that the comparison took.
        reason: why nothing was proved; None if the step is proved.
        turns: number of turns whose gradients were compared, each from the first weights; 0 for a step without turns.
        uncompressed: whether the strategy compresses gradients, so that exact ones were compared in their place.
    """

    proved: bool
    loss_error: float | None = None
    gradient_error: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    turns: int = 0
    uncompressed: bool = False

    def __str__(self) -> str:
        if not self.proved:
            return f"first step not proved: {self.reason}"
        what = f"first step, each of its {self.turns} turns from the same weights," if self.turns else "first step"
        gradients = "uncompressed gradients" if self.uncompressed else "gradients"
        return f"{what} equals one process: loss {self.loss_error:.0e}, {gradients} {self.gradient_error:.0e}"


NO_STEP = FirstStep(False, reason="no step was left to take")


@dataclass(frozen=True, slots=True)
class Step:
    """Record of one optimizer step, as it is written to metrics.jsonl.

    `seconds` is the time since the previous step; None if it was not measured (see `metrics.TrainingClock`). `samples`
    counts the samples of all workers.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float | None
    gradient_norm: float | None
    samples: int
    seconds: float | None
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float | None:
        """Return the samples per second of all workers together. Returns None if the step was not timed."""
        return self.samples / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of a training on one worker.

    Attributes:
        summary: the document that `train --json` prints.
        steps: steps of this run; on rank 0 only.
        evaluations: step -> values measured on held-out data after it.
        weights: weights of the plain model by name; on rank 0 only, and None unless they were requested.
        stopped: number of the signal that ended the training early; 0: none did.
    """

    summary: dict[str, Any]
    steps: tuple[Step, ...]
    evaluations: dict[int, dict[str, float]]
    weights: dict[str, Tensor] | None = None
    stopped: int = 0
