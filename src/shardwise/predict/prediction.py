"""Prediction of one training step: time by part, peak memory, throughput and utilization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak memory of one device in bytes, by category.

    The first five are tensors, see `predict.closed_form.memory`. The last three are what a worker needs beside them,
    see `predict.closed_form.device_memory`.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    process: int = 0
    fragments: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """Return the bytes of all categories together, which have to fit into the device."""
        return self.allocated + self.fragments + self.context

    @property
    def allocated(self) -> int:
        """Return the bytes that a run measures: on a GPU what its allocator has given out, on a CPU its process."""
        return self.tensors + self.process

    @property
    def tensors(self) -> int:
        """Return the bytes of all tensors."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary", "process", "fragments", "context")
"""Categories of memory: the fields of `Memory`, in their order."""


def categories(memory: Memory) -> dict[str, int]:
    """Return the bytes of each category of memory by name."""
    return {name: getattr(memory, name) for name in CATEGORIES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted costs of one optimizer step. Times are seconds on the busiest device.

    step = compute + exposed communication + bubble + optimizer + host, where communication is exposed if compute does
    not hide it.

    Attributes:
        step_seconds: time of one optimizer step.
        compute_seconds: kernels of forward and backward passes, including recomputation.
        communication_seconds: all communication, hidden or not.
        exposed_communication_seconds: time for which the device waits for communication.
        bubble_seconds: time for which the device waits for other stages of the pipeline.
        optimizer_seconds: update of the parameters.
        host_seconds: time for which the device waits for the host to launch kernels.
        memory: peak memory of the device that needs most.
        memory_available: bytes that it has to fit into: the device's usable memory, less by the margin.
        margin: share of the usable memory that has to stay free.
        precision: dtype of the computation, `float32` or `bf16`.
        half_peak_flops: floating point operations per second of all devices together in bf16, or in fp16 if they have
            no bf16; 0 if they have neither.
        error: relative error that nine in ten such predictions keep. None if it is not known.
        notes: remarks on the strategy to show to users.
        model_flops: floating point operations that the model needs for the step on all devices, without recomputation.
        peak_flops: floating point operations per second of all devices together, in the dtype of the computation.
        samples: samples of one step on all devices.
        terms: finer parts of the step's time for display, seconds by name.
        origins: origin of each number that the prediction rests on, by name: measured, datasheet, fitted or assumed.
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
    margin: float = 0.0
    precision: str = "float32"
    half_peak_flops: float = 0.0
    error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def alpha(self) -> float:
        """Return communication time over compute time: alpha in T = T_compute (1 + alpha)."""
        return self.communication_seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def exposed_alpha(self) -> float:
        """Return exposed communication time over compute time."""
        return self.exposed_communication_seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def memory_usable(self) -> int:
        """Return the bytes of the device that a worker can use, with the margin."""
        return round(self.memory_available / (1 - self.margin))

    @property
    def fits(self) -> bool:
        """Return whether the peak memory fits into the device's memory and leaves its margin."""
        return self.memory.total <= self.memory_available

    @property
    def samples_per_second(self) -> float:
        """Return the throughput of all devices together."""
        return self.samples / self.step_seconds

    @property
    def model_flops_utilization(self) -> float:
        """Return the model's FLOPs over the peak FLOPs of the step (model FLOPs utilization; Chowdhery et al. 2022)."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def half_flops_utilization(self) -> float | None:
        """Return the model's FLOPs over those that the devices could do in bf16. Returns None if they have no bf16."""
        return self.model_flops / (self.step_seconds * self.half_peak_flops) if self.half_peak_flops else None

    @property
    def low_seconds(self) -> float | None:
        """Return the lower end of the range of the step time. Returns None if the error is not known."""
        return None if self.error is None else self.step_seconds / (1 + self.error)

    @property
    def high_seconds(self) -> float | None:
        """Return the upper end of the range of the step time. Returns None if the error is not known."""
        return None if self.error is None else self.step_seconds * (1 + self.error)
