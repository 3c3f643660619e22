"""Find the cut points of a step, at which it may be cut into consecutive parts.

A part may begin before any call that uses a parameter. Between two such calls, the point with the fewest bytes to send
is taken. A cut point is identified by the parameter use that follows it, so every shape of a step (training,
evaluation, the last small batch) is cut alike. Values computed from the batch alone (masks, positions) are not sent:
each part that needs them recomputes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import fx

from shardwise.parallel.tensor.aliasing import roots, together, writes_in_place
from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.overlap import late, overlapping
from shardwise.parallel.tensor.partitioner import LocalGraph

Use = tuple[str, int]
"""The n-th use of a parameter in a step: (name, n)."""


@dataclass(frozen=True, slots=True)
class CutPoint:
    """Cut point of a step, before call `position`: `values` values with `bytes` bytes in total are sent onwards.

    `use` is the parameter use that follows it.
    """

    use: Use
    position: int
    bytes: int
    values: int


def calls(graph: fx.Graph) -> list[fx.Node]:
    """List the calls of a graph in order."""
    return [node for node in graph.nodes if node.op == "call_function"]


def from_batch(local: LocalGraph) -> set[fx.Node]:
    """Return the nodes that depend on the batch and on constants only, so that any worker can compute them."""
    tensors = set(local.step.tensors)
    found: set[fx.Node] = set()
    where = roots(local.graph)
    changed = {where[node] for node in calls(local.graph) if writes_in_place(node)}
    for node in local.graph.nodes:
        if where[node] in changed:
            continue
        if node.op == "placeholder":
            if node.name not in tensors:
                found.add(node)
        elif node.op == "call_function":
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if not random and all(argument in found for argument in node.all_input_nodes):
                found.add(node)
    return found


def uses(graph: fx.Graph, tensors: Mapping[str, str], parameters: Collection[str]) -> dict[fx.Node, list[Use]]:
    """Map each call to the parameter uses that it makes. `tensors` maps placeholders to parameter and buffer names."""
    names = {node: tensors.get(node.name) for node in graph.nodes if node.op == "placeholder"}
    passed_on = (Exchange.enter, Exchange.divide, late)
    counts: dict[str, int] = {}
    found: dict[fx.Node, list[Use]] = {}
    for node in calls(graph):
        if getattr(node.target, "__func__", node.target) in passed_on:  # its result is the same tensor
            names[node] = names.get(node.all_input_nodes[0])
            continue
        for argument in node.all_input_nodes:
            name = names.get(argument)
            if name is not None and name in parameters:
                found.setdefault(node, []).append((name, counts.get(name, 0)))
                counts[name] = counts.get(name, 0) + 1
    return found


def find_cut_points(local: LocalGraph, parameters: Collection[str]) -> list[CutPoint]:
    """Return all cut points of the step in order."""
    sequence = calls(local.graph)
    used = uses(local.graph, local.step.tensors, parameters)
    live = _crossing(local, sequence)
    for first, end in _uncut(local, parameters):
        for index in range(sequence.index(first) + 1, sequence.index(end) + 1):
            live[index] = None
    found: list[CutPoint] = []
    start = None
    for index, node in enumerate(sequence):
        if node not in used:
            continue
        if start is not None:
            options = [(*crossing, i) for i in range(start + 1, index + 1) if (crossing := live[i]) and crossing[1]]
            if options:
                size, count, position = min(options, key=lambda option: (option[0], option[2]))
                found.append(CutPoint(used[node][0], position, size, count))
        start = index
    return found


def common(training: Sequence[CutPoint], evaluation: Sequence[CutPoint]) -> list[CutPoint]:
    """Return the cut points of a training step that exist in its evaluation too, in the same order."""
    position = {cut_point.use: cut_point.position for cut_point in evaluation}
    found: list[CutPoint] = []
    last = -1
    for cut_point in training:
        if position.get(cut_point.use, -1) > last:
            found.append(cut_point)
            last = position[cut_point.use]
    return found


def _uncut(local: LocalGraph, parameters: Collection[str]) -> list[tuple[fx.Node, fx.Node]]:
    """Return (first, last) pairs of calls that must stay in one part."""
    buffers = {placeholder for placeholder, name in local.step.tensors.items() if name not in parameters}
    return [*together(local.graph, buffers), *overlapping(local.graph)]


def _crossing(local: LocalGraph, sequence: list[fx.Node]) -> list[tuple[int, int] | None]:
    """Return before each call (bytes, number) of the values made before and used after it.

    None if no cut is possible there.
    """
    batch = from_batch(local)
    number = {node: index for index, node in enumerate(sequence)}
    starts: list[list[fx.Node]] = [[] for _ in range(len(sequence) + 2)]
    ends: list[list[fx.Node]] = [[] for _ in range(len(sequence) + 2)]
    for node in sequence:
        if node in batch:
            continue
        last = max((number.get(user, len(sequence)) for user in node.users if user not in batch), default=-1)
        if last > number[node]:
            starts[number[node] + 1].append(node)
            ends[last + 1].append(node)
    crossing: list[tuple[int, int] | None] = []
    size = count = tuples = 0
    for index in range(len(sequence) + 1):
        for sign, nodes in ((1, starts[index]), (-1, ends[index])):
            for node in nodes:
                whole = node.meta.get("shape") is None
                tuples += sign * whole
                count += sign * (not whole)
                size += 0 if whole else sign * prod(node.meta["shape"]) * node.meta["dtype"].itemsize
        crossing.append(None if tuples else (size, count))
    return crossing


def positions(local: LocalGraph, cut: Sequence[Use], parameters: Collection[str]) -> list[int]:
    """Convert the cut points `cut` to call indices in another shape of the step."""
    found = {cut_point.use: cut_point.position for cut_point in find_cut_points(local, parameters)}
    return [found[use] for use in cut]


def ranges(local: LocalGraph, at: Sequence[int]) -> list[range]:
    """Return the call indices of each part of a step that is cut before the calls `at`."""
    return [range(start, end) for start, end in pairwise([0, *at, len(calls(local.graph))])]
