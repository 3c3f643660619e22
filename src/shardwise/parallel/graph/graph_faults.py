"""Find the first value that is not finite in a worker's part of a traced step: values that leave a module are
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from shardwise.parallel.faults import LAST, LOSS, Fault, RerunPass, module_named, not_finite
from shardwise.parallel.pipeline.cut_points import calls
from shardwise.parallel.pipeline.stage import StepWork
from shardwise.parallel.pipeline.subgraphs import Section
from shardwise.parallel.tensor.aliasing import writes_in_place
from shardwise.parallel.tensor.partitioner import LocalGraph


class Watched:
    """A worker's part of a traced step that checks every value that leaves a module.

    Args:
        work: the work of the stages.
        own: the indices of this worker's stages.

    Attributes:
        work: the same work, which records its first fault in `seen`.
        seen: (place in the graph, module, value) of the first value that is not finite. None if all are finite.
    """

    def __init__(self, work: StepWork, own: Sequence[int]) -> None:
        self.seen: tuple[int, str, str] | None = None
        self._positions = {node: position for position, node in enumerate(calls(work.local.graph))}
        stages = list(work.stages)
        for stage in own:
            blocks = tuple(
                replace(piece, function=self._interpreted(piece.section, work.local)) for piece in stages[stage].blocks
            )
            stages[stage] = replace(stages[stage], blocks=blocks)
        self.work = replace(work, stages=tuple(stages))

    def fault(self, each: RerunPass, rank: int, loss: Tensor | None) -> Fault | None:
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

        def run(narrow: Callable[[Tensor], Tensor], *arguments: Any) -> tuple[Any, ...]:
            named = dict(zip(section.tensors, arguments, strict=False))
            rest = arguments[len(section.tensors) :]
            values: dict[fx.Node, Any] = {
                node: narrow(named[tensors[node.name]]) if local.step.is_narrow(node) else named[tensors[node.name]]
                for node in holders
            }
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
            self.seen = self._positions[node], module_named(path), kind


def _leaves(node: fx.Node, path: str) -> bool:
    """Return whether the result of a call in the module at `path` is used outside of that module."""
    inside = f"{path}." if path else ""
    others = [user.meta.get("module") for user in node.users]
    return any(other is None or not (other == path or other.startswith(inside)) for other in others)
