"""What a training gives back: plain values that travel from the workers to their parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one optimizer step was predicted to take before the run.

    Attributes:
        seconds: of a step.
        memory_bytes: of the worker that needs most.
        reason: why there is no prediction, where there is none.
    """

    seconds: float | None = None
    memory_bytes: int | None = None
    reason: str = ""


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """Predicted over measured, less one; None where one of them is not known."""
    return predicted / measured - 1.0 if predicted is not None and measured else None


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as it is written to metrics.jsonl.

    `seconds` is the time since the step before it; None where that was not measured (see `metrics.Clock`).
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float | None
    gradient_norm: float | None
    samples: int
    seconds: float | None

    @property
    def samples_per_second(self) -> float | None:
        """Global samples per second; None where the step was not timed."""
        return self.samples / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training gives back.

    Attributes:
        summary: the document that `train --json` prints.
        steps: the steps of this run; on rank 0 only.
        evaluations: step -> what was measured on held-out data after it.
        weights: the plain model's weights by name, on rank 0 only and if they were asked for.
        stopped: number of the signal that ended it before its time; 0: none did.
    """

    summary: dict[str, Any]
    steps: tuple[Step, ...]
    evaluations: dict[int, dict[str, float]]
    weights: dict[str, Tensor] | None = None
    stopped: int = 0
