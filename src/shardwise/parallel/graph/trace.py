"""Trace a step of any module: a submodule that cannot be traced becomes one opaque call in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn

from shardwise.parallel.engine import Position
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.operators.module_patches import ModulePatches
from shardwise.parallel.state.build_model import untouched
from shardwise.parallel.tensor.aliasing import writes_in_place
from shardwise.workload.own_step import check_trained, run_step
from shardwise.workload.precision import calls_computing, computing, kept_of
from shardwise.workload.trace.evolving import trace_evolving
from shardwise.workload.trace.graph import StepGraph, Untraceable, first_line
from shardwise.workload.trace.opaque import Call, CallRecorder
from shardwise.workload.trace.python_state import for_trace
from shardwise.workload.workload import Workload, call_model


def traced(
    workload: Workload, model: nn.Module, batch: Any, *, training: bool = True, evaluation: int = 0
) -> StepGraph:
    """Trace a step with `workload.trace.graph.trace`, with each module that cannot be traced as an opaque call.

    The innermost module that fails becomes the call, and so do a module with hooks on its backward pass and one whose
    forward changes values in Python. It is called with whole tensors on every tp worker, and pp never cuts it in two.
    The model runs once on `batch` for each round of such modules.

    Raises:
        Untraceable: the failure is outside of all modules or in the outermost one, or the model has no values yet.
        WorkloadError: the loss is not a scalar, or a step of one's own trains nothing.
    """
    opaque: dict[str, Sequence[Call]] = {}
    wanted = _hooked(model) if training else {}
    while True:
        if wanted:
            opaque = {name: calls for name, calls in opaque.items() if not _within(name, wanted)}
            opaque |= _recorded(workload, model, batch, wanted, training)
        try:
            step, wanted = trace_evolving(
                workload, model, batch, training=training, evaluation=evaluation, opaque=opaque
            )
        except Untraceable as error:
            if not error.module or error.module in opaque:
                raise
            wanted = {error.module: error.reason}
            if any(parameter.is_meta for parameter in model.parameters()):
                raise
        if not wanted:
            if training and workload.step is not None:
                check_trained(workload, _trains(step))
            return step


def _trains(step: StepGraph) -> bool:
    """Return whether a gradient may flow from the loss to a tensor of the model; true where values are overwritten."""
    nodes = list(step.graph.nodes)
    if any(writes_in_place(node) for node in nodes if node.op == "call_function"):
        return True
    waiting, seen = list(nodes[-1].args[0][:1]), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.name in step.tensors:
            return True
        if node not in seen and node.target is not torch.ops.aten.detach.default:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _within(name: str, paths: Mapping[str, str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _hooked(model: nn.Module) -> dict[str, str]:
    """Return the modules with hooks on their backward pass, which a trace would lose, with the reason."""
    why = "it has hooks on its backward pass"
    hooked = {
        name: why for name, module in model.named_modules() if module._backward_hooks or module._backward_pre_hooks
    }
    return {name: why for name in hooked if not _within(name, {other: why for other in hooked if other != name})}


def _recorded(
    workload: Workload, model: nn.Module, batch: Any, paths: Mapping[str, str], training: bool
) -> dict[str, Sequence[Call]]:
    """Record the calls of the modules at `paths`, given with reasons, in a pass on `batch`.

    Afterwards all tensors and values in Python are as before.

    Raises:
        Untraceable: the pass fails, one of them is the whole model or is not called, or there are no values yet.
    """
    path, reason = next(iter(paths.items()))
    if "" in paths or any(parameter.is_meta for parameter in model.parameters()):
        raise Untraceable(workload, path or None, paths.get("", reason))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    operations = ModulePatches(Position(), device)
    recorders = {
        path: CallRecorder(model.get_submodule(path), path, reason, operations.drawn) for path, reason in paths.items()
    }
    try:
        with (
            for_trace(model, training=training),
            torch.set_grad_enabled(training),
            random_state_kept(),
            untouched(model),
            ExitStack() as stack,
        ):
            for recorder in recorders.values():
                stack.enter_context(recorder.open())
            stack.enter_context(operations.training_pass())
            own = training and workload.step is not None
            precision = workload.precision
            kept = kept_of(precision, model, workload.float32)
            stack.enter_context(
                calls_computing(precision, model, model.parameters, kept=kept)
                if own
                else computing(precision, model.parameters(), kept=kept)
            )
            if own:
                run_step(workload, model, batch)
            else:
                call_model(model, workload.inputs(batch))
    except Exception as error:
        raise Untraceable(workload, path, f"{reason}; run as it is: {first_line(error)}") from error
    silent = next((path for path, recorder in recorders.items() if not recorder.calls), None)
    if silent is not None:
        raise Untraceable(workload, silent, f"{paths[silent]}, and the model does not call it")
    return {path: tuple(recorder.calls) for path, recorder in recorders.items()}
