"""Where a step may be cut into consecutive parts, and where it is best cut.

A part may begin before any call that uses a parameter; between two such calls the place with the least to send is
taken. Places are known by the parameter use that follows them, so that every shape of a step (training, evaluation,
the last small batch) is cut alike. What is computed from the batch alone (masks, positions) is not sent: each part
that needs it computes it again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from shardwise.parallel.exchange import Exchange
from shardwise.parallel.memory import roots, together, writes_in_place
from shardwise.parallel.partitioner import LocalGraph

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

Use = tuple[str, int]
"""The n-th use of a parameter in a step: (name, n)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place where a step may be cut: before call `position`, which is `bytes` in `values` to send onwards."""

    use: Use
    position: int
    bytes: int
    values: int


def calls(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a graph, in order."""
    return [node for node in graph.nodes if node.op == "call_function"]


def from_batch(local: LocalGraph) -> set[fx.Node]:
    """Nodes that depend on the batch and on constants only, so that any worker can compute them."""
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
    """Which uses of parameters each call is; `tensors` names those that placeholders stand for."""
    names = {node: tensors.get(node.name) for node in graph.nodes if node.op == "placeholder"}
    passed_on = (Exchange.enter, Exchange.divide)
    counts: dict[str, int] = {}
    found: dict[fx.Node, list[Use]] = {}
    for node in calls(graph):
        if getattr(node.target, "__func__", None) in passed_on:  # the same tensor
            names[node] = names.get(node.all_input_nodes[0])
            continue
        for argument in node.all_input_nodes:
            name = names.get(argument)
            if name is not None and name in parameters:
                found.setdefault(node, []).append((name, counts.get(name, 0)))
                counts[name] = counts.get(name, 0) + 1
    return found


def places(local: LocalGraph, parameters: Collection[str]) -> list[Place]:
    """All places where the step may be cut, in order."""
    sequence = calls(local.graph)
    used = uses(local.graph, local.step.tensors, parameters)
    live = _crossing(local, sequence)
    for first, end in _uncut(local, parameters):
        for index in range(sequence.index(first) + 1, sequence.index(end) + 1):
            live[index] = None
    found: list[Place] = []
    start = None
    for index, node in enumerate(sequence):
        if node not in used:
            continue
        if start is not None:
            options = [(*crossing, i) for i in range(start + 1, index + 1) if (crossing := live[i]) and crossing[1]]
            if options:
                size, count, position = min(options, key=lambda option: (option[0], option[2]))
                found.append(Place(used[node][0], position, size, count))
        start = index
    return found


def common(training: Sequence[Place], evaluation: Sequence[Place]) -> list[Place]:
    """The places of a training step that are in its evaluation too, in the same order."""
    position = {place.use: place.position for place in evaluation}
    found: list[Place] = []
    last = -1
    for place in training:
        if position.get(place.use, -1) > last:
            found.append(place)
            last = position[place.use]
    return found


def _uncut(local: LocalGraph, parameters: Collection[str]) -> list[tuple[fx.Node, fx.Node]]:
    """(first, last) calls that must stay in one part."""
    buffers = {placeholder for placeholder, name in local.step.tensors.items() if name not in parameters}
    return together(local.graph, buffers)


def _crossing(local: LocalGraph, sequence: list[fx.Node]) -> list[tuple[int, int] | None]:
    """Before each call: (bytes, number) of the values that are made before and used after; None: no cut is possible."""
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


def balanced(
    costs: Sequence[float],
    sends: Sequence[float],
    parts: int,
    speeds: Sequence[float] = (),
    slower: Sequence[float] = (),
) -> list[int]:
    """Cuts a chain into consecutive parts such that the most expensive part is as cheap as can be.

    Dynamic programming over (parts, end), of parts that cost no more than those of some way to cut. Of equally good
    cuts the one that sends least is taken.

    Args:
        costs: of each link of the chain, at least as many as `parts`.
        sends: what it costs to begin a part at each link but the first (what arrives there), in the same unit.
        parts: their number.
        speeds: of who computes each part; a part costs so many times less. None: all are as fast.
        slower: how many times as much it costs to begin each part but the first. None: as `sends` says.

    Returns:
        the first link of each part but the first.

        >>> balanced([1, 1, 1, 3], [0, 0, 0], 2)
        [3]
        >>> balanced([1, 1, 1, 1], [0, 0, 0], 2, [3, 1])
        [3]
    """
    count = len(costs)
    if parts == 1:
        return []
    until = np.array(list(accumulate(costs, initial=0.0)))
    entry = np.array([0.0, *sends, 0.0])
    speeds, slower = speeds or [1.0] * parts, [1.0, *(slower or [1.0] * (parts - 1))]
    most = _even(until, entry, parts, slower) * max(speeds) / min(speeds)
    starts, own = _parts_up_to(until, most)
    worst, sent = until / speeds[0], np.zeros(count + 1)
    choices: list[tuple[int, list[int]]] = []
    for part in range(1, parts):
        band = _ends(until, part, parts, most)
        from_, arrives = starts[band], entry * slower[part]
        cost = np.where(from_ >= part, np.maximum(worst[from_], (own[band] + arrives[from_]) / speeds[part]), np.inf)
        least = cost.min(axis=1)
        sums = sent + arrives
        total = np.where(cost == least[:, None], sums[from_], np.inf)
        choice = from_[np.arange(len(from_)), total.argmin(axis=1)]
        worst, sent = np.full(count + 1, np.inf), np.zeros(count + 1)
        worst[band], sent[band] = least, sums[choice]
        choices.append((band.start, choice.tolist()))
    cuts: list[int] = []
    end = count
    for first, choice in reversed(choices):
        end = choice[end - first]
        cuts.append(end)
    return cuts[::-1]


def _ends(until: Floats, part: int, parts: int, most: float) -> slice:
    """Where a part may end, if neither those up to it nor those behind it cost more than `most` each."""
    slack = most * (1 + 1e-9)
    low = np.searchsorted(until, until[-1] - (parts - part - 1) * slack)
    high = np.searchsorted(until, (part + 1) * slack, side="right")
    return slice(int(low), min(int(high), len(until)))


def _even(until: Floats, entry: Floats, parts: int, slower: Sequence[float]) -> float:
    """What the most expensive part costs where all take about as many links or as much as each other."""
    count = len(until) - 1
    shares = np.arange(1, parts) / parts
    by_cost = np.searchsorted(until, shares * until[-1])
    fitting = np.clip(by_cost, np.arange(1, parts), count - parts + np.arange(1, parts))
    fitting = np.maximum.accumulate(fitting - np.arange(parts - 1)) + np.arange(parts - 1)
    bounds = np.concatenate(([0], fitting, [count]))
    return float((np.diff(until[bounds]) + entry[bounds[:-1]] * np.array(slower)).max())


def _parts_up_to(until: Floats, most: float) -> tuple[Integers, Floats]:
    """(start, cost without what arrives) of the parts that end before each link and cost no more than `most`: a row
    for each end.

    Rows are filled up with a first column of starts that cost infinitely much.
    """
    count = len(until) - 1
    ends = np.arange(count + 1)
    slack = most * (1 + 1e-9)
    first = np.searchsorted(until, until - slack)
    width = max(1, int((ends - first).max()))
    starts = ends[:, None] - np.arange(width, 0, -1)[None, :]
    fits = starts >= 0
    starts = np.maximum(starts, 0)
    own = until[:, None] - until[starts]
    return starts, np.where(fits & (own <= slack), own, np.inf)


def positions(local: LocalGraph, cut: Sequence[Use], parameters: Collection[str]) -> list[int]:
    """Where the places `cut` are in another shape of the step, as numbers of calls."""
    found = {place.use: place.position for place in places(local, parameters)}
    return [found[use] for use in cut]


def ranges(local: LocalGraph, at: Sequence[int]) -> list[range]:
    """The calls of each part when a step is cut before the calls `at`."""
    return [range(start, end) for start, end in pairwise([0, *at, len(calls(local.graph))])]
