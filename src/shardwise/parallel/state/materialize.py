"""Allocate the local part of parameters on the meta device, and read it from weight files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.parallel.mesh import Allocating
from shardwise.parallel.state.dtensor_rows import is_split, local
from shardwise.parallel.state.layout import Layout
from shardwise.workload.weight_files import Weights


def materialize(
    root: nn.Module, device: torch.device, home: torch.device | None = None, allocating: Allocating = nullcontext
) -> None:
    """Allocate all parameters of `root` that are on the meta device. Tied ones stay tied; buffers are unchanged.

    DTensor parameters remain the same objects; others are replaced by new ones.

    Args:
        root: a module.
        device: device of parameters that are held whole.
        home: device of parameters of which only some rows are held; `device` if left out.
        allocating: see `Mesh`.
    """
    with allocating():
        if any(is_split(parameter) and parameter.is_meta for parameter in root.parameters()):
            _fill_rows(root, home or device)
        _fill_whole(root, device)


def _fill_rows(root: nn.Module, device: torch.device) -> None:
    """Allocate the DTensor parameters through `_apply`, after which `fully_shard` looks at its parameters again."""

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
    """Read the local part of a parameter from the weight files, and nothing beyond it.

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
    """Move every parameter and buffer that has values to `device`; those on meta stay there."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    apply: Callable[..., nn.Module] = model._apply
    apply(moved)
