"""What a strategy will cost on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak memory of one device in bytes, by what it holds; `process`: what a CPU's worker needs beside its tensors."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    process: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.tensors + self.process

    @property
    def tensors(self) -> int:
        """Without the process."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary", "process")
"""Of memory, in the order of `Memory`'s fields."""


def categories(memory: Memory) -> dict[str, int]:
    """Bytes by category."""
    return {name: getattr(memory, name) for name in CATEGORIES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one optimizer step, on the device that is busiest. All times in seconds.

    step = compute + exposed communication + bubble + optimizer + host, where communication that is hidden behind
    compute is not exposed.

    Attributes:
        step_seconds: one optimizer step.
        compute_seconds: kernels of forward and backward passes, recomputation included.
        communication_seconds: all communication, hidden or not.
        exposed_communication_seconds: during which the device waits.
        bubble_seconds: during which it waits for other stages of the pipeline.
        optimizer_seconds: update of the parameters.
        host_seconds: during which it waits for the host to launch kernels.
        memory: of the device that needs most.
        memory_available: of that device in bytes.
        model_flops: floating point operations of the step that the model needs, without recomputation, all devices.
        peak_flops: per second, of all devices together in the dtype of the computation.
        samples: of one step.
        terms: finer parts of the step's time for people, by name.
        origins: what the prediction rests on, by name: measured, datasheet, fitted or assumed.
    """

    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    bubble_seconds: float
    optimizer_seconds: float
    host_seconds: float
    memory: Memory
    memory_available: int
    model_flops: float
    peak_flops: float
    samples: int
    terms: Mapping[str, float] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """Communication time over compute time, as in T = T_compute (1 + alpha)."""
        return self.communication_seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def exposed_alpha(self) -> float:
        """Communication that is not hidden behind compute, over compute time."""
        return self.exposed_communication_seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.memory.total <= self.memory_available

    @property
    def samples_per_second(self) -> float:
        """Of all devices together."""
        return self.samples / self.step_seconds

    @property
    def model_flops_utilization(self) -> float:
        """FLOPs that the model needs over what the devices could do in that time (MFU; Chowdhery et al. 2022)."""
        return self.model_flops / (self.step_seconds * self.peak_flops)
