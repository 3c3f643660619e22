"""What a program needs from the part that computes: two engines offer it.

`parallel.data.ModuleEngine` runs the module as it is (single, dp, fsdp). `parallel.staged.GraphEngine` runs the traced
graph of the module (tp, pp and their products). The program above them owns the optimizer, clipping and the schedule,
and does not know which of the two it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from shardwise.parallel.layout import Layout
from shardwise.workload.data import Microbatch, Share

if TYPE_CHECKING:
    from shardwise.parallel.faults import Fault


@dataclass(slots=True)
class Position:
    """Where in the training the engine is: what dropout is drawn from. Set before every microbatch.

    Attributes:
        seed: of the workload.
        step: optimizer steps done before this one.
        first: position of the microbatch's first sample in the global batch.
        samples: samples that go through the model here (a sample that only keeps step counts as one).
        counted: samples that count; 0 for a sample that only keeps step.
    """

    seed: int = 0
    step: int = 0
    first: int = 0
    samples: int = 1
    counted: int = 1

    def enter(self, microbatch: Microbatch) -> None:
        """Goes to the place of a microbatch in its step."""
        self.first = microbatch.first
        self.samples = microbatch.samples or 1  # the one sample that only keeps step
        self.counted = microbatch.samples


@dataclass(frozen=True, slots=True)
class Held:
    """How one named tensor (parameter or buffer) lies on this worker.

    Attributes:
        tensor: the parameter or buffer itself; a DTensor under `fully_shard`.
        layout: where its local part lies in the global tensor.
        holders: number of workers that hold each element (1 where it is split over all of them).
        writes: whether this worker is the one to write it to a checkpoint.
        sharded: whether tensor parallelism split it.
    """

    tensor: Tensor
    layout: Layout
    holders: int
    writes: bool
    sharded: bool = False


class Engine(Protocol):
    """Computes gradients; see the module's docstring."""

    position: Position
    parameters: dict[str, nn.Parameter]
    """Trained parameters held here, by their name in the plain module (a tied one once, by its first name)."""
    held: dict[str, Held]
    """Every parameter (also frozen ones) and persistent buffer held here."""
    aliases: dict[str, str]
    """Further names of tied parameters and buffers -> the name in `held`. The same on all workers."""
    uniform: bool
    """Whether microbatches must have one size (see `cut_batch`)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know: what stayed replicated and why, one line each."""
        ...

    @property
    def recomputing(self) -> bool:
        """Whether a block is computed again for its backward pass."""
        ...

    @property
    def unused(self) -> Sequence[str]:
        """Names of `parameters` that got no gradient here in the last `forward_backward`: `.grad` is None or zero.

        Only those whose use may differ between replicas: empty where the graph is the same on all.
        """
        ...

    def forward_backward(self, share: Share, scales: Sequence[Tensor]) -> Tensor:
        """Gradient of the sum over all replicas and microbatches of `scale * loss`, left in `.grad` of `parameters`.

        `scales` has one 0-d tensor per microbatch of the share. Returns a 0-d tensor, detached: this worker's part of
        that sum, such that adding up the values of all workers gives it (0 where a worker does not hold the loss).
        """
        ...

    def find_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find this worker's first value that is not finite in the forward passes of a share, by running them again.

        Nothing is changed but buffers and torch's random state. Microbatches whose scale is 0 count nothing.
        """
        ...

    def find_gradient_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find a parameter held here whose gradient is not finite, after a step whose forward passes are finite."""
        ...

    def evaluate(self, microbatch: Microbatch) -> Tensor:
        """(loss, metric) of a microbatch in evaluation mode, shape (2,), detached; zeros where not held here.

        Adding up the values of the workers that share one replica gives the replica's. The metric is 0 without an
        evaluation in the workload.
        """
        ...
