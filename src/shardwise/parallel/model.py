"""Builds the plain module of a workload, the same on every worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardwise.errors import WorkloadError
from shardwise.parallel.deal import broadcast
from shardwise.parallel.gather import gather_json
from shardwise.parallel.materialize import move_values
from shardwise.parallel.mesh import Mesh
from shardwise.workload.stored import weights_of
from shardwise.workload.workload import Workload

_BUILT: WeakSet[nn.Module] = WeakSet()
"""Modules of programs: they are changed in place, so that none can be used twice."""


def build_model(workload: Workload, mesh: Mesh) -> nn.Module:
    """The module of `workload` on our device, with the weights of worker 0. Collective over all workers.

    A factory that does not follow the random seed gives other weights on every worker: those of worker 0 are sent to
    all. What it leaves torch's random state at is replaced: each replica draws its own from here on.

    Raises:
        WorkloadError: no module, nothing to train, parameters without a shape, or another structure on some worker.
    """
    model = plain_model(workload)
    _check(model, workload)
    _BUILT.add(model)
    move_values(model, mesh.device)
    if mesh.world is not None:
        _make_equal(model, workload, mesh)
    torch.manual_seed(workload.seed + mesh.replica)
    return model


def plain_model(workload: Workload) -> nn.Module:
    """The module as its factory builds it from the workload's seed, in training mode. Sets torch's random state.

    Raises:
        WorkloadError: the factory builds no module.
    """
    torch.manual_seed(workload.seed)
    model = workload.model()
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model of workload {workload.name!r} must build an nn.Module, not {type(model).__name__}")
    if not model.training:
        model.train()
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


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters and persistent buffers -> their first names."""
    first: dict[torch.Tensor, str] = {}
    aliases = {}
    named = [*model.named_parameters(remove_duplicate=False), *persistent_buffers(model, all_names=True).items()]
    for name, tensor in named:
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return aliases


def persistent_buffers(model: nn.Module, *, all_names: bool = False) -> dict[str, torch.Tensor]:
    """The buffers that a state dict holds, by their first name, or by each of their names."""
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
    """Evaluation mode; afterwards every module is in the mode that it was in, also one that is never in training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What passes through the model do to its buffers meanwhile, in place or by assignment, is undone."""
    held = [(module, key, buffer) for module in model.modules() for key, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in held]
    try:
        yield
    finally:
        for (module, key, buffer), value in zip(held, values, strict=True):
            module._buffers[key] = buffer
            if buffer is not None and value is not None:
                with torch.no_grad():
                    buffer.copy_(value)
