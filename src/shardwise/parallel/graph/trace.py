"""Trace a step of any module: a submodule that cannot be traced becomes one opaque call in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardwise.parallel.engine import Position
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.operators.module_patches import ModulePatches
from shardwise.parallel.state.build_model import untouched
from shardwise.workload.trace.graph import StepGraph, Untraceable, first_line, trace
from shardwise.workload.trace.opaque import Call, CallRecorder
from shardwise.workload.workload import Workload, call_model


def traced(workload: Workload, model: nn.Module, batch: Any, *, training: bool = True) -> StepGraph:
    """Trace a step with `workload.trace.graph.trace`, with each module that cannot be traced as an opaque call.

    The innermost module that fails becomes the call. It is called with whole tensors on every tp worker, and pp never
    cuts it in two. The model runs once on `batch` for each such module.

    Raises:
        Untraceable: the failure is outside of all modules or in the outermost one, or the model has no values yet.
        WorkloadError: the loss is not a scalar.
    """
    opaque: dict[str, Sequence[Call]] = {}
    while True:
        try:
            return trace(workload, model, batch, training=training, opaque=opaque)
        except Untraceable as error:
            path = error.module
            if not path or path in opaque or any(parameter.is_meta for parameter in model.parameters()):
                raise
            opaque = {name: calls for name, calls in opaque.items() if not name.startswith(f"{path}.")}
            opaque[path] = _recorded(workload, model, batch, path, error.reason, training)
            if not opaque[path]:
                raise


def _recorded(
    workload: Workload, model: nn.Module, batch: Any, path: str, reason: str, training: bool
) -> Sequence[Call]:
    """Record the calls of the module at `path` in a pass on `batch`. Afterwards all tensors have their old values."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    operations = ModulePatches(Position(), device)
    recorder = CallRecorder(model.get_submodule(path), path, reason, operations.drawn)
    modes = {module: module.training for module in model.modules()}
    if not training:
        model.eval()
    try:
        with (
            torch.no_grad(),
            random_state_kept(),
            recorder.open(),
            untouched(model),
            operations.training_pass(),
        ):
            call_model(model, workload.inputs(batch))
    except Exception as error:
        raise Untraceable(workload, path, f"{reason}; run as it is: {first_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return tuple(recorder.calls)
