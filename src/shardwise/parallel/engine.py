"""Interface between a program and the part that computes gradients. Two engines implement it.

`parallel.data.module_engine.ModuleEngine` runs the module unchanged (single, dp, fsdp).
`parallel.graph.graph_engine.GraphEngine` runs the traced graph of the module (tp, pp and their products). The program
above them owns the optimizer, clipping and the schedule, and does not know which of the two it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.data.joining import Joining
from shardwise.parallel.faults import Fault
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.workload.data import Microbatch, Share


@dataclass(slots=True)
class Position:
    """Position of the engine in the training, which keys dropout. Set before every microbatch.

    Attributes:
        seed: the workload's seed.
        step: optimizer steps completed before this one.
        turn: number of the turn in the step, from 0; see `Workload.turns`.
        first: index of the microbatch's first sample in the global batch.
        samples: samples that pass through the model here, at least 1 (a dummy sample that only keeps the worker in
            step).
        counted: samples that count; 0 for a dummy sample.
        exact: whether replicas join gradients exactly, whatever the strategy says: to compare them.
    """

    seed: int = 0
    step: int = 0
    turn: int = 0
    first: int = 0
    samples: int = 1
    counted: int = 1
    exact: bool = False

    def enter(self, microbatch: Microbatch) -> None:
        """Move to the position of a microbatch in its step."""
        self.first = microbatch.first
        self.samples = microbatch.samples or 1  # one dummy sample keeps the worker in step
        self.counted = microbatch.samples


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Evaluation of a microbatch on this worker.

    Attributes:
        values: (loss, metric), shape (2,), float64 and detached. The values of the workers that share one replica add
            up to the replica's. The metric is 0 if an object collects the outputs.
        held: whether `output` is held here, for an object that collects the outputs.
        output: output of the model.
        batch: the microbatch's data.
    """

    values: Tensor
    held: bool = False
    output: Any = None
    batch: Any = None


class Engine(Protocol):
    """Part of a program that computes gradients; see the module's docstring."""

    position: Position
    parameters: dict[str, nn.Parameter]
    """Trained parameters held here, by their name in the plain module; a tied one once, by its first name."""
    trained: dict[str, nn.Parameter]
    """All trained parameters of the plain module in its order, whole, without values (on the meta device)."""
    held: dict[str, TensorPlacement]
    """Every parameter (also frozen ones) and persistent buffer held here, by name."""
    aliases: dict[str, str]
    """Further names of tied parameters and buffers -> the name in `held`; equal on all workers."""
    losses: dict[str, Tensor]
    """This worker's parts of the last step's losses by name, 0-d, if there are several; else empty."""
    uniform: bool
    """True if all microbatches must have one size (see `cut_batch`)."""
    joining: Joining | None
    """Reducers of the gradients; None for a single replica."""
    averages: bool
    """True if replicas average the gradients, of losses times their number; False if they sum them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, one line each: for example what stayed replicated and why."""
        ...

    @property
    def recomputing(self) -> bool:
        """Return whether a block is being recomputed for its backward pass."""
        ...

    @property
    def module(self) -> nn.Module:
        """Return the module whose Python code runs in every pass: the model, or one with the parts not traced."""
        ...

    @property
    def draws_other_random_numbers(self) -> bool:
        """Return whether the model drew random numbers that workers do not share, which differ between strategies."""
        ...

    @property
    def unused(self) -> Sequence[str]:
        """Return the names of `parameters` that got no gradient here in the last `forward_backward`.

        Their `.grad` is None or zero. Only parameters whose use may differ between replicas are listed: none if the
        graph is the same on all.
        """
        ...

    def forward_backward(self, share: Share, scales: Sequence[Tensor]) -> Tensor:
        """Compute the gradient of the sum of `scale * loss` over all replicas and microbatches.

        Losses and gradients are those of the turn in `position`, of its parameters alone.
        The gradient is left in `.grad` of `parameters`. `scales` has one 0-d tensor per microbatch of the share.
        Returns this worker's part of that sum, 0-d and detached. The parts of all workers add up to the sum, so a
        worker that does not hold the loss returns 0.
        """
        ...

    def find_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find this worker's first value that is not finite in the forward passes of a share, by running them again.

        Changes nothing but buffers and torch's random state. Microbatches with scale 0 are ignored.
        """
        ...

    def find_gradient_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find a parameter held here whose gradient is not finite, after a step whose forward passes are finite."""
        ...

    def evaluate(self, microbatch: Microbatch, number: int) -> Evaluated:
        """Compute loss and metric of a microbatch in evaluation mode, for evaluation `number` of the workload."""
        ...

    def unsplit_layout(self, name: str) -> Layout:
        """Return the layout of a parameter as this worker would hold it if `fully_shard` did not split it."""
        ...

    def partial_groups(self, name: str) -> Sequence[dist.ProcessGroup]:
        """Return the groups over which parts of a parameter's gradient are summed, besides its replicas."""
        ...
