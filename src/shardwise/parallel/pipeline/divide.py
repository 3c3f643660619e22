"""Divide a step into pipeline stages and blocks by the cost of its layers.

Costs are measured: worker 0 runs the operations of the forward pass one by one (a backward pass costs about twice as
much, for all of them alike). All workers take its numbers, so all cut alike. If parameters have no values yet, because
each worker is to read only its part of them, costs are estimated from operation counts instead.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from shardwise.errors import StrategyError
from shardwise.parallel.mesh import Mesh, random_state_kept
from shardwise.parallel.pipeline.cut_points import CutPoint, Use, calls, common, find_cut_points, uses
from shardwise.parallel.pipeline.link_speed import measured_links
from shardwise.parallel.tensor.partitioner import LocalGraph
from shardwise.splitting.balance import BYTES_PER_SECOND, Cuts, check_stages, cuts_blocks, divided
from shardwise.splitting.slow_links import much_slower
from shardwise.strategy import Strategy
from shardwise.workload.trace.graph import StepGraph, batch_leaves
from shardwise.workload.trace.opaque import OPAQUE, run_opaque
from shardwise.workload.trace.python_state import PythonState

FLOPS_PER_SECOND, MEMORY_BYTES_PER_SECOND = 1e11, 1e10
"""Assumed speed of a worker where nothing can be measured; only their ratio influences the cut."""


@dataclass(frozen=True, slots=True)
class Division:
    """Chosen cut points of a step.

    Attributes:
        cuts: first segment of each block, by stage.
        cut: all chosen cut points, each by the parameter use that follows it.
        cut_points: number of available cut points.
    """

    cuts: Cuts
    cut: tuple[Use, ...]
    cut_points: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Return the number of blocks of each stage."""
        return tuple(map(len, self.cuts))


def divide(
    step: StepGraph,
    local: LocalGraph,
    tensors: Mapping[str, Tensor],
    data: Any,
    strategy: Strategy,
    mesh: Mesh,
    parameters: Collection[str],
    evaluation: LocalGraph | None = None,
    cuts: Cuts | None = None,
) -> Division:
    """Cut a step into the stages of `strategy`, and those into blocks if it gathers or recomputes. Collective.

    The graph of an evaluation, which may leave out parts of the training step, is cut at the same points. Given `cuts`
    are used without measuring.

    Raises:
        StrategyError: the step cannot be cut into that many stages, or the given cuts do not fit the step.
    """
    found = find_cut_points(local, parameters)
    if evaluation is not None:
        found = common(found, find_cut_points(evaluation, parameters))
    stages = strategy.pp * strategy.stages_per_worker
    check_stages(strategy, len(found))
    in_blocks = cuts_blocks(strategy)
    if stages == 1 and not in_blocks:
        return Division(((0,),), (), len(found))
    if cuts is not None:
        _check_cuts(cuts, stages, len(found))
        return _division(cuts, found)
    seconds, messages = _of_worker_0(_seconds(step, tensors, data, parameters, mesh), found, mesh)
    costs = _segment_costs(step, found, seconds, parameters)
    device = "cpu" if mesh.device.type == "cpu" else "gpu"
    slower = much_slower(measured_links(mesh), BYTES_PER_SECOND[device])
    parts = divided(costs, messages, stages, device, speeds=strategy.stage_speeds, slower=slower, in_blocks=in_blocks)
    return _division(tuple(map(tuple, parts)), found)


def _division(cuts: Cuts, found: Sequence[CutPoint]) -> Division:
    starts = [start for stage in cuts for start in stage if start]
    return Division(cuts, tuple(found[segment - 1].use for segment in starts), len(found))


def _check_cuts(cuts: Cuts, stages: int, cut_points: int) -> None:
    starts = [start for stage in cuts for start in stage]
    ascending = all(a < b for a, b in pairwise(starts))
    if len(cuts) != stages or not all(cuts) or starts[0] != 0 or starts[-1] > cut_points or not ascending:
        raise StrategyError(
            f"cuts {cuts} are not those of {stages} stages of {cut_points + 1} segments: each stage has the ascending "
            "numbers of the segments at which its blocks begin, the first of them 0"
        )


def _segment_costs(
    step: StepGraph, found: Sequence[CutPoint], costs: Mapping[Use, float], parameters: Collection[str]
) -> list[float]:
    """Sum the costs of the parameter uses in each segment between two cut points."""
    starts = {cut_point.use: index + 1 for index, cut_point in enumerate(found)}
    segments = [0.0] * (len(found) + 1)
    current = 0
    for used in uses(step.graph, step.tensors, parameters).values():
        for use in used:
            current = starts.get(use, current)
            segments[current] += costs.get(use, 0.0)
    return segments


def _seconds(
    step: StepGraph, tensors: Mapping[str, Tensor], data: Any, parameters: Collection[str], mesh: Mesh
) -> dict[Use, float]:
    """Return the seconds of the forward pass from each parameter use to the next.

    Returns zeros where worker 0 measures them.
    """
    used = uses(step.graph, step.tensors, parameters)
    if any(tensor.is_meta for tensor in tensors.values()):  # nothing to measure; a dry run has no worker 0 to ask
        seconds = counted(step, used)
    elif mesh.rank == 0:
        seconds = _timed(step, tensors, data, used)
    else:
        seconds = [0.0] * len(used)
    return dict(zip([use[0] for use in used.values()], seconds, strict=True))


def _of_worker_0(
    seconds: Mapping[Use, float], found: Sequence[CutPoint], mesh: Mesh
) -> tuple[dict[Use, float], list[float]]:
    """Return the seconds, and the bytes to send at each cut point, as worker 0 has them. Collective.

    All must cut alike, but replicas with unequal shares of a batch have messages of different sizes.
    """
    numbers = [*seconds.values(), *(cut_point.bytes for cut_point in found)]
    agreed = torch.tensor(numbers, dtype=torch.float64, device=mesh.device)
    if (mesh.whole or mesh).world is not None:
        dist.broadcast(agreed, 0)
    values = agreed.tolist()
    return dict(zip(seconds, values, strict=False)), values[len(seconds) :]


@torch.no_grad()
def counted(step: StepGraph, used: Mapping[fx.Node, list[Use]]) -> list[float]:
    """Estimate the seconds from each parameter use to the next: FLOPs and bytes moved, at assumed rates."""
    seconds = [0.0] * len(used)
    current = -1
    for node in calls(step.graph):
        current += node in used
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _on_meta)
        with FlopCounterMode(display=False) as counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
        moved = [tree_leaves(each.meta.get("val")) for each in (node, *node.all_input_nodes)]
        size = sum(leaf.numel() * leaf.itemsize for leaves in moved for leaf in leaves if isinstance(leaf, Tensor))
        seconds[max(current, 0)] += counter.get_total_flops() / FLOPS_PER_SECOND + size / MEMORY_BYTES_PER_SECOND
    return seconds


def _on_meta(node: fx.Node) -> Any:
    def converted(leaf: Any) -> Any:
        return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf

    return tree_map(converted, node.meta.get("val"))


@torch.no_grad()
def _timed(
    step: StepGraph, tensors: Mapping[str, Tensor], data: Any, used: Mapping[fx.Node, list[Use]], repeats: int = 3
) -> list[float]:
    changeable = (*(t for t in tensors.values() if not isinstance(t, torch.nn.Parameter)), *step.constants.values())
    before = [(tensor, tensor.clone()) for tensor in changeable]
    states = [PythonState(call.module) for call in step.opaque]
    best = [float("inf")] * len(used)
    with random_state_kept():
        for _ in range(repeats):
            for index, seconds in enumerate(_timed_once(step, tensors, data, used)):
                best[index] = min(best[index], seconds)
    for tensor, value in before:  # restore batch norm's statistics
        tensor.data.copy_(value)
    for state in states:
        state.restore()
    return best


def _timed_once(
    step: StepGraph, tensors: Mapping[str, Tensor], data: Any, used: Mapping[fx.Node, list[Use]]
) -> list[float]:
    leaves = dict(zip(step.leaves, batch_leaves(data), strict=True))
    values: dict[fx.Node, Any] = {}
    for node in step.graph.nodes:
        if node.op == "placeholder":
            values[node] = _given(step, node.name, tensors, leaves)
    seconds = [0.0] * len(used)
    current = -1
    last = {argument: node for node in calls(step.graph) for argument in node.all_input_nodes}
    for node in calls(step.graph):
        current += node in used
        args = fx.node.map_arg((node.args, node.kwargs), lambda argument: values[argument])
        start = time.perf_counter()
        target: Any = run_opaque if node.target is OPAQUE else node.target
        values[node] = target(*args[0], **args[1])
        _synchronize(values[node])
        seconds[max(current, 0)] += time.perf_counter() - start
        for argument in node.all_input_nodes:
            if last[argument] is node:
                values.pop(argument, None)
    return seconds


def _given(step: StepGraph, name: str, tensors: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> Any:
    if name in step.tensors:
        tensor = tensors[step.tensors[name]].detach()
        return tensor.to(torch.bfloat16) if step.tensors[name] in step.narrow else tensor
    return step.constants[name] if name in step.constants else leaves[name]


def _synchronize(value: Any) -> None:
    if isinstance(value, Tensor) and value.is_cuda:
        torch.cuda.synchronize(value.device)
