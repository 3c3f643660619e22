"""Find the first value of a step that is not finite by running its forward passes again.

The step's update has not been applied and the effects of its passes have been undone, so the same values appear again.
On plain modules, hooks check what each module returns; `parallel.graph.graph_faults` checks a worker's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.workload.data import Microbatch, Share
from shardwise.workload.pytree import tensors_of

LOSS = "the loss function"
"""Name of the fault's location if every module returned finite values."""

LAST = 2**62
"""Place of the loss in the order of a pass: after all modules."""


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """First value that is not finite on a worker. The smallest fault of all workers is the first one of the step.

    Attributes:
        microbatch: index of the microbatch in the step; -1 for a parameter before the step.
        position: index of the value in the order of the pass.
        rank: the worker's rank; -1 if it is not known.
        what: `module 'blocks.1.fc'`, `the gradient of head.weight`, ...
        value: `nan` or `inf`.
    """

    microbatch: int
    position: int
    rank: int
    what: str
    value: str

    def __str__(self) -> str:
        """Describe the fault: `module 'blocks.1.fc' on worker 1 (inf)`."""
        where = "" if self.rank < 0 else f" on worker {self.rank}"
        return f"{self.what}{where} ({self.value})"


@dataclass(frozen=True, slots=True)
class RerunPass:
    """Microbatch whose forward pass is run again.

    Attributes:
        number: index of the microbatch in the share.
        microbatch: its samples.
        scale: factor of its loss, 0-d.
        counts: whether the scale is not 0; with scale 0 the microbatch has no effect.
    """

    number: int
    microbatch: Microbatch
    scale: Tensor
    counts: bool

    def fault(self, rank: int, position: int, what: str, value: str) -> Fault:
        """Return a fault in this pass.

        The message says if the batch itself holds nan; infinite masks in a batch are too common to report.
        """
        sick = not_finite(self.microbatch.data) == "nan"
        return Fault(self.number, position, rank, f"{what}, of a batch that holds nan itself," if sick else what, value)


def passes_of(share: Share, scales: Sequence[Tensor]) -> list[RerunPass]:
    """Return one `RerunPass` for each microbatch of a share."""
    together = enumerate(zip(share.microbatches, scales, strict=True))
    return [RerunPass(number, microbatch, scale, bool(scale != 0)) for number, (microbatch, scale) in together]


def not_finite(value: Any) -> str:
    """Return `nan` or `inf` if tensors in `value` hold such numbers (`nan` if both), else an empty string."""
    floats = [tensor.detach() for tensor in tensors_of(value) if tensor.is_floating_point() or tensor.is_complex()]
    if any(bool(tensor.isnan().any()) for tensor in floats):
        return "nan"
    return "inf" if any(bool(tensor.isinf().any()) for tensor in floats) else ""


def parameter_fault(parameters: Mapping[str, Tensor], rank: int) -> Fault | None:
    """Find a parameter that was not finite before the step. Returns None if all are finite."""
    for name, parameter in parameters.items():
        if value := not_finite(parameter):
            return Fault(-1, 0, rank, f"parameter {name}, before the step,", value)
    return None


def scale_fault(scales: Sequence[Tensor]) -> Fault | None:
    """Find a microbatch whose weight is not finite. One replica's weight makes the scales of all replicas so."""
    for number, scale in enumerate(scales):
        if value := not_finite(scale):
            return Fault(number, -1, -1, "the weight of the batch", value)
    return None


def gradient_fault(gradients: Mapping[str, Tensor], rank: int, first: int = 0) -> Fault | None:
    """Find the last parameter of the model whose gradient is not finite, because the backward pass starts at the end.

    Args:
        gradients: gradients by name, in the order of the model.
        rank: this worker, or -1 if the gradients have already been summed over several workers.
        first: place of the gradient that is checked first.
    """
    for position, (name, gradient) in enumerate(reversed(list(gradients.items())), first):
        if value := not_finite(gradient):
            return Fault(0, position, rank, f"the gradient of {name}", value)
    return None


def module_fault(
    model: nn.Module, replay: Callable[[Microbatch], Tensor], passes: Sequence[RerunPass], rank: int
) -> Fault | None:
    """Find the first module whose output is not finite. Collective if the model's forward passes are.

    Args:
        model: the model whose modules are checked.
        replay: runs the forward pass of a microbatch and returns its loss.
        passes: the passes of this worker.
        rank: this worker.
    """
    found: list[Fault] = []
    for each in passes:
        with torch.no_grad(), _hooked(model) as seen:
            loss = replay(each.microbatch)
        if value := not_finite(loss):
            seen.append((LAST, LOSS, value))
        if seen and each.counts:  # no early exit: other workers take part in every pass
            found.append(each.fault(rank, *seen[0]))
    return min(found, default=None)


@contextmanager
def _hooked(model: nn.Module) -> Iterator[list[tuple[int, str, str]]]:
    """Record the first output inside the block that is not finite.

    Yields a list that gets its (place, module, value).
    """
    seen: list[tuple[int, str, str]] = []
    returned = 0

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal returned
            returned += 1
            if not seen and (value := not_finite(output)):
                seen.append((returned, module_named(name), value))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def module_named(path: str) -> str:
    """Return the module at a path in words."""
    return f"module {path!r}" if path else "the model itself"
