"""The forms of a workload's loss: one number or several by name, computed by a function or by a module.

Several losses are added up; the sum is trained. A loss, or a step of one's own, that is a module with parameters is
trained as well: copies of its parameters and buffers become the model's own, so that every engine, optimizer and
checkpoint sees them. It is not made a submodule, because some models (`nn.Sequential`) call all submodules that they
have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from shardwise.errors import WorkloadError
from shardwise.workload.workload import Workload

Entry = TypeVar("Entry")

PREFIX = "loss__"
"""Start of the names, in the model, of the parameters and buffers of a loss; their dots become `__`."""


def with_loss(model: nn.Module, workload: Workload) -> nn.Module:
    """Give `model` copies of the loss's parameters and buffers if the loss is a module with parameters; return it.

    Parameters of a step of one's own are treated alike.

    Raises:
        WorkloadError: the model has an attribute of such a name already, or a step leaves the loss untrained.
    """
    function = workload.loss if workload.step is None else workload.step
    if workload.step is not None and has_parameters(workload.loss):
        raise WorkloadError(
            f"loss of workload {workload.name!r} has parameters, which its step does not train: make the step a module "
            "that has them"
        )
    if not has_parameters(function):
        return model
    loss = copy.deepcopy(function)
    assert isinstance(loss, nn.Module)
    for name, own in _names(loss).items():
        if hasattr(model, own):
            raise WorkloadError(
                f"the model of workload {workload.name!r} has an attribute {own!r}: give it another name"
            )
        owner, _, last = name.rpartition(".")
        module = loss.get_submodule(owner)
        tensor = getattr(module, last)
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(own, tensor)
        else:
            model.register_buffer(own, tensor, persistent=last not in module._non_persistent_buffers_set)
    return model


def _names(loss: nn.Module) -> dict[str, str]:
    """Return the name in the loss of each of its parameters and buffers -> the name in the model."""
    named = [*loss.named_parameters(), *loss.named_buffers()]
    return {name: PREFIX + name.replace(".", "__") for name, _ in named}


def has_parameters(loss: Any) -> bool:
    """Return whether a loss is a module with parameters."""
    return isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None


def without_loss(weights: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of the model alone, without those of the parameters and buffers of a loss."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}


def losses_of(workload: Workload, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
    """Return the losses of a batch by name, each 0-d; a single loss has the name `loss`.

    Args:
        workload: workload whose loss to compute.
        model: module that `with_loss` returned.
        output: output of the model.
        batch: the batch.

    Raises:
        WorkloadError: a loss is no scalar tensor.
    """
    return named_losses(workload, "loss", called(workload.loss, model, output, batch))


def named_losses(workload: Workload, what: str, value: Any) -> dict[str, Tensor]:
    """Return losses by name, each 0-d; a single loss has the name `loss`.

    Args:
        workload: workload that they are of.
        what: words for `value` in errors.
        value: what the workload's function has returned.

    Raises:
        WorkloadError: a loss is no scalar tensor.
    """
    named = dict(value) if isinstance(value, Mapping) else {"loss": value}
    for name, loss in named.items():
        if not isinstance(loss, Tensor) or loss.dim():
            found = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            label = what if value is loss else f"loss {name!r}"
            raise WorkloadError(
                f"{label} of workload {workload.name!r} {found}: must be a scalar tensor, the mean over the samples of "
                "the batch, or a dict of such tensors"
            )
    if not named:
        raise WorkloadError(f"the {what} of workload {workload.name!r} is an empty dict: it must hold a scalar tensor")
    return named


def called(function: Any, model: nn.Module, *args: Any) -> Any:
    """Call a loss, or a step of one's own, with the model's copies of its parameters if it has any."""
    if not has_parameters(function):
        return function(*args)
    tensors = {name: getattr(model, own) for name, own in _names(function).items()}
    return functional_call(function, tensors, args)


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of losses, which is trained."""
    first, *others = losses.values()
    for other in others:
        first = first + other
    return first
