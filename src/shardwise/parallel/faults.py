"""Find the first value of a step that is not finite by running its forward passes again.

The step's update has not been applied and the effects of its passes have been undone, so the same values appear again.
On plain modules, hooks check what each module returns; on a worker's graph, the values that leave a module are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwise.parallel.pipeline.cut_points import calls
from shardwise.parallel.pipeline.stage import Work
from shardwise.parallel.pipeline.subgraphs import Section
from shardwise.parallel.state.pytree import tensors_of
from shardwise.parallel.tensor.aliasing import writes_in_place
from shardwise.parallel.tensor.partitioner import LocalGraph
from shardwise.workload.data import Microbatch, Share

LOSS = "the loss function"
"""Name of the fault's location if every module returned finite values."""

LAST = 2**62
"""Place of the loss in the order of a pass: after all modules."""


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """First value that is not finite on a worker. The smallest fault of all workers is the first one of the step.

    Attributes:
        microbatch: index of the microbatch in the step; -1 for a parameter before the step.
        place: index of the value in the order of the pass.
        rank: the worker's rank; -1 if it is not known.
        what: `module 'blocks.1.fc'`, `the gradient of head.weight`, ...
        value: `nan` or `inf`.
    """

    microbatch: int
    place: int
    rank: int
    what: str
    value: str

    def __str__(self) -> str:
        """Describe the fault: `module 'blocks.1.fc' on worker 1 (inf)`."""
        where = "" if self.rank < 0 else f" on worker {self.rank}"
        return f"{self.what}{where} ({self.value})"


@dataclass(frozen=True, slots=True)
class Pass:
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

    def fault(self, rank: int, place: int, what: str, value: str) -> Fault:
        """Return a fault in this pass.

        The message says if the batch itself holds nan; infinite masks in a batch are too common to report.
        """
        sick = not_finite(self.microbatch.data) == "nan"
        return Fault(self.number, place, rank, f"{what}, of a batch that holds nan itself," if sick else what, value)


def passes_of(share: Share, scales: Sequence[Tensor]) -> list[Pass]:
    """Return one `Pass` for each microbatch of a share."""
    together = enumerate(zip(share.microbatches, scales, strict=True))
    return [Pass(number, microbatch, scale, bool(scale != 0)) for number, (microbatch, scale) in together]


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
    for place, (name, gradient) in enumerate(reversed(list(gradients.items())), first):
        if value := not_finite(gradient):
            return Fault(0, place, rank, f"the gradient of {name}", value)
    return None


def module_fault(
    model: nn.Module, replay: Callable[[Microbatch], Tensor], passes: Sequence[Pass], rank: int
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
                seen.append((returned, _named(name), value))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _named(path: str) -> str:
    return f"module {path!r}" if path else "the model itself"


class Watched:
    """A worker's part of a traced step that checks every value that leaves a module.

    Args:
        work: the work of the stages.
        own: the indices of this worker's stages.

    Attributes:
        work: the same work, which records its first fault in `seen`.
        seen: (place in the graph, module, value) of the first value that is not finite. None if all are finite.
    """

    def __init__(self, work: Work, own: Sequence[int]) -> None:
        self.seen: tuple[int, str, str] | None = None
        self._places = {node: place for place, node in enumerate(calls(work.local.graph))}
        stages = list(work.stages)
        for stage in own:
            blocks = tuple(
                replace(piece, function=self._interpreted(piece.section, work.local)) for piece in stages[stage].blocks
            )
            stages[stage] = replace(stages[stage], blocks=blocks)
        self.work = replace(work, stages=tuple(stages))

    def fault(self, each: Pass, rank: int, loss: Tensor | None) -> Fault | None:
        """Return the fault that was recorded in a microbatch, and clear it.

        `loss` is None on workers that do not hold it.
        """
        seen, self.seen = self.seen, None
        if seen is None and loss is not None and (value := not_finite(loss)):
            seen = LAST, LOSS, value
        return each.fault(rank, *seen) if seen and each.counts else None

    def _interpreted(self, section: Section, local: LocalGraph) -> Callable[..., tuple[Any, ...]]:
        """Return a function that runs a section call by call and checks each result.

        It computes the same as `subgraphs.compiled`.
        """
        tensors = local.step.tensors
        holders = [n for n in local.graph.nodes if n.op == "placeholder" and tensors.get(n.name) in section.tensors]
        copies = any(writes_in_place(node) and node.args[0] not in holders for node in section.nodes)

        def run(*arguments: Any) -> tuple[Any, ...]:
            named = dict(zip(section.tensors, arguments, strict=False))
            rest = arguments[len(section.tensors) :]
            values: dict[fx.Node, Any] = {node: named[tensors[node.name]] for node in holders}
            values.update(zip((*section.given, *section.inputs), rest, strict=True))
            if copies:
                values.update({node: values[node].clone() for node in section.inputs})
            for node in section.nodes:
                args: Any = fx.node.map_arg(node.args, values.__getitem__)
                kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                self._look(node, values[node])
            return tuple(values[node] for node in section.outputs)

        return run

    def _look(self, node: fx.Node, value: Any) -> None:
        path = node.meta.get("module")
        if path is not None and self.seen is None and _leaves(node, path) and (kind := not_finite(value)):
            self.seen = self._places[node], _named(path), kind


def _leaves(node: fx.Node, path: str) -> bool:
    """Return whether the result of a call in the module at `path` is used outside of that module."""
    inside = f"{path}." if path else ""
    others = [user.meta.get("module") for user in node.users]
    return any(other is None or not (other == path or other.startswith(inside)) for other in others)
