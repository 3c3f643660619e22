"""Trace a step whose forward pass changes values in Python, and find the modules that must run as they are.

A number that `forward` changes (`self.calls += 1`) would stay in the graph as it was. So the values in Python are
compared before and after a trace. If some have changed, the step is traced again as the first trace left them: what
changes once more, or makes the second graph another one, evolves from pass to pass. What is merely remembered (shapes
of this batch, an output for others to read) does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from shardwise.workload.trace.graph import StepGraph, Untraceable, names_of, trace
from shardwise.workload.trace.opaque import OPAQUE, Call
from shardwise.workload.trace.python_state import Change, Place, PythonState, for_trace
from shardwise.workload.workload import Workload

Reasons = dict[str, str]
"""Name of a module that must run as it is -> the reason."""


def functions_of(workload: Workload) -> list[Callable[..., Any]]:
    """Return the functions of a workload that are part of the graph of a step."""
    measures = [evaluation.measure for evaluation in workload.evaluations if not evaluation.collects]
    return [workload.inputs, workload.loss, *workload.steps, *measures]


def trace_evolving(
    workload: Workload,
    model: nn.Module,
    batch: Any,
    *,
    training: bool,
    evaluation: int = 0,
    opaque: Mapping[str, Sequence[Call]],
) -> tuple[StepGraph, Reasons]:
    """Trace a step, see `graph.trace`, and find the modules whose values in Python evolve from pass to pass.

    Returns the graph, which is right if there are none. All values are as before afterwards.

    Raises:
        Untraceable: the step cannot be traced, or what evolves is not inside of one module.
    """
    functions = functions_of(workload)

    def traced(after: Callable[[], None]) -> StepGraph:
        return trace(workload, model, batch, training=training, evaluation=evaluation, opaque=opaque, after=after)

    def look() -> PythonState:
        return PythonState(model, functions, without=opaque)

    with for_trace(model, training=training), ExitStack() as stack:  # the mode is no value that the pass changes
        before, later = look(), list[PythonState]()
        stack.callback(before.restore)
        step = traced(lambda: later.append(look()))
        before.restore()
        first = later[0].differences(before)
        if not first:
            return step, {}
        later[0].restore()
        found = list[Change]()
        with _writers(model, later[0].places) as written:
            try:
                again: StepGraph | None = traced(lambda: found.extend(later[0].changes()))
            except Untraceable:
                again = None  # it read a tensor that the first trace left behind
        found = [change for change in found if change.plain]
        if again is None or (not found and not _equal(step, again)):
            found = found or first
        by_label = {place.label: names for place, names in written.items()}
        return step, _homes(workload, [(each, by_label.get(each.place.label, set())) for each in found])


def _homes(workload: Workload, found: Sequence[tuple[Change, set[str | None]]]) -> Reasons:
    """Return the smallest modules that hold what changes and those who change it.

    Raises Untraceable if there is no such module.
    """
    homes: Reasons = {}
    for change, writers in found:
        names = {*change.place.all_holders(), *writers}
        home = "" if None in names else _common(sorted(name for name in names if name is not None))
        if not home:
            raise Untraceable(workload, None, f"the forward pass changes {change}, which a trace would fix")
        homes.setdefault(home, f"its forward pass changes {change}")
    return {name: why for name, why in homes.items() if not any(name.startswith(f"{o}.") for o in homes)}


def _common(names: Sequence[str]) -> str:
    """Return the name of the innermost module around all of `names`."""
    parts = [name.split(".") if name else [] for name in names]
    shared = []
    for several in zip(*parts, strict=False):
        if len(set(several)) > 1:
            break
        shared.append(several[0])
    return ".".join(shared)


@contextmanager
def _writers(model: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, set[str | None]]]:
    """Record which module's own forward changes which place inside the context; None stands for what is outside."""
    names = names_of(model)
    running: list[str | None] = [None]
    found: dict[Place, set[str | None]] = {}
    known = {place: place.read() for place in places}

    def look() -> None:
        for place, items in known.items():
            now = place.read()
            if len(now) != len(items) or any(now.get(key, now) is not value for key, value in items.items()):
                found.setdefault(place, set()).add(running[-1])
                known[place] = now

    def enter(module: nn.Module, _: Any) -> None:
        look()
        running.append(names.get(id(vars(module))))

    def leave(module: nn.Module, *_: Any) -> None:
        look()
        running.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _equal(one: StepGraph, other: StepGraph) -> bool:
    """Return whether two traces of a step compute the same."""
    return _described(one) == _described(other) and all(
        torch.equal(tensor, other.constants[name]) for name, tensor in one.constants.items()
    )


def _described(step: StepGraph) -> list[Any]:
    nodes = []
    for node in step.graph.nodes:
        args = node.args[0] if node.target is OPAQUE else node.args  # each trace numbers its calls
        nodes.append((node.op, str(node.target), str(args), str(node.kwargs)))
    return [nodes, sorted(step.constants), sorted(step.tensors.items())]
