"""Build the plain module of a workload with equal weights on every worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardwise.errors import WorkloadError
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.broadcast import broadcast
from shardwise.parallel.state.gather import gather_json
from shardwise.parallel.state.materialize import move_values
from shardwise.parallel.state.mode_changes import check_modes
from shardwise.workload.losses import with_loss
from shardwise.workload.precision import check_kept
from shardwise.workload.trace.python_state import PythonState
from shardwise.workload.warm_start import load_warm_start
from shardwise.workload.weight_files import weights_of
from shardwise.workload.workload import Workload

_BUILT: WeakSet[nn.Module] = WeakSet()
"""Modules already used by a program. A program changes its module in place, so no module can be used twice."""


def build_model(workload: Workload, mesh: Mesh) -> nn.Module:
    """Build the module of `workload` on this worker's device, with the weights of worker 0.

    Collective over all workers.

    A factory that ignores the random seed gives different weights on every worker, so worker 0 broadcasts its own to
    all. The random state that the factory leaves behind is replaced: from here on each replica draws its own numbers.

    Raises:
        WorkloadError: the factory builds no module, the model has nothing to train, a parameter has no shape or no
            values, a module changes weights with its mode where that cannot work, or the structure differs between
            workers.
    """
    model = plain_model(workload)
    _check(model, workload)
    check_modes(model, workload, mesh.strategy)
    _BUILT.add(model)
    move_values(model, mesh.device)
    everyone = mesh.whole or mesh
    if everyone.world is not None:
        _make_equal(model, workload, everyone)
    torch.manual_seed(workload.seed + everyone.replica)
    return model


def plain_model(workload: Workload) -> nn.Module:
    """Call the workload's factory under the workload's seed, and return the module in training mode.

    Sets torch's random state.

    Raises:
        WorkloadError: the factory builds no `nn.Module`, the workload's weights do not fit it, or `float32` names what
            it has not.
    """
    torch.manual_seed(workload.seed)
    model = workload.model()
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model of workload {workload.name!r} must build an nn.Module, not {type(model).__name__}")
    if not model.training:
        model.train()
    model = with_loss(model, workload)
    load_warm_start(model, workload)
    check_kept(model, workload.float32)
    return model


def _check(model: nn.Module, workload: Workload) -> None:
    if model in _BUILT:
        raise WorkloadError(
            f"model of workload {workload.name!r} gave a module that is in use already: it must build a new one at "
            "each call, copy.deepcopy(module) for example"
        )
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise WorkloadError(
            f"parameter {lazy} of workload {workload.name!r} has no shape yet: call the model once in its factory"
        )
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None and weights_of(workload.model) is None:
        raise WorkloadError(
            f"parameter {empty} of workload {workload.name!r} is on the meta device, without values: build the model "
            "with its weights, or give a folder that has them in safetensors files"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise WorkloadError(f"the model of workload {workload.name!r} has no parameter to train (requires_grad)")


def frozen_later(name: str) -> str:
    """Return the message that a parameter was frozen or unfrozen during training."""
    return (
        f"requires_grad of parameter {name!r} has changed since training began: which parameters are trained must be "
        "settled by then; end the run, and go on with another workload from its checkpoint"
    )


def _make_equal(model: nn.Module, workload: Workload, mesh: Mesh) -> None:
    assert mesh.world is not None
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = [(name, str(tensor.dtype), *tensor.shape, tensor.requires_grad) for name, tensor in tensors.items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()
    others = gather_json(digest, mesh.world, mesh.device)
    wrong = next((rank for rank, other in enumerate(others) if other != others[0]), None)
    if wrong is not None:
        raise WorkloadError(
            f"the model of workload {workload.name!r} has other parameters on worker {wrong} than on worker 0: its "
            "factory must build the same model everywhere"
        )
    broadcast([tensor.detach() for tensor in tensors.values() if not tensor.is_meta], mesh.world, 0)


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a module by name, without values: on the meta device."""
    return {
        name: nn.Parameter(torch.empty_like(parameter, device="meta"))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return every further name of a tied parameter or persistent buffer -> its first name."""
    first: dict[torch.Tensor, str] = {}
    aliases = {}
    named = [*model.named_parameters(remove_duplicate=False), *persistent_buffers(model, all_names=True).items()]
    for name, tensor in named:
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return aliases


def persistent_buffers(model: nn.Module, *, all_names: bool = False) -> dict[str, torch.Tensor]:
    """Return the buffers that a state dict holds, by their first name or (`all_names`) by each of their names."""
    found: dict[str, torch.Tensor] = {}
    seen: set[torch.Tensor] = set()
    for prefix, module in model.named_modules(remove_duplicate=not all_names):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and (all_names or buffer not in seen):
                seen.add(buffer)
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode inside the block.

    Afterwards every module is in the mode that it was in before, including modules that are never in training mode. A
    module's own `train` is called, as in a plain training loop: it may undo what its `eval` did.
    """
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        model.train(model in training)
        for module in model.modules():
            module.training = module in training


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo every change that forward passes inside the block make to buffers and to the modules' values in Python."""
    state = PythonState(model)
    held = [(module, key, buffer) for module in model.modules() for key, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in held]
    try:
        yield
    finally:
        state.restore()
        for (module, key, buffer), value in zip(held, values, strict=True):
            module._buffers[key] = buffer
            if buffer is not None and value is not None:
                with torch.no_grad():
                    buffer.copy_(value)
