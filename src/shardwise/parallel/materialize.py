"""Gives a module whose parameters are on the meta device memory for its part of them, and reads that from files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.parallel.layout import Layout
from shardwise.parallel.mesh import Allocating
from shardwise.parallel.rows import is_split, local
from shardwise.workload.stored import Weights


def materialize(
    root: nn.Module, device: torch.device, home: torch.device | None = None, allocating: Allocating = nullcontext
) -> None:
    """Memory for all parameters of `root` where they are on meta; tied ones stay tied, buffers as they are.

    Parameters of which only some rows are held stay the objects that they are; others are made anew.

    Args:
        root: a module.
        device: for what is held whole.
        home: for rows; the same if left out.
        allocating: see `Mesh`.
    """
    with allocating():
        if any(is_split(parameter) and parameter.is_meta for parameter in root.parameters()):
            _fill_rows(root, home or device)
        _fill_whole(root, device)


def _fill_rows(root: nn.Module, device: torch.device) -> None:
    """`fully_shard` looks at its parameters again when a function is applied to its modules."""

    def filled(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta and is_split(tensor) else tensor

    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        apply: Callable[..., nn.Module] = root._apply
        apply(filled)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _fill_whole(root: nn.Module, device: torch.device) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in root.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[parameter] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[key] = made[parameter]


def read_weights(weights: Weights, name: str, tensor: Tensor, layout: Layout) -> None:
    """Fills the local part of a parameter, and reads no more than that.

    Raises:
        WorkloadError: the stored tensor has another shape.
    """
    stored = weights.shape(name)
    if stored != layout.shape:
        raise WorkloadError(f"{name} is stored with shape {stored}, the model has {layout.shape}")
    with torch.no_grad():
        for tile in layout.tiles:
            tile.view(local(tensor)).copy_(weights.read(name, tile.offsets, tile.sizes))


def move_values(model: nn.Module, device: torch.device) -> None:
    """Moves all that has values to a device; parameters on meta stay there."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    apply: Callable[..., nn.Module] = model._apply
    apply(moved)
