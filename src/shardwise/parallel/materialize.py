"""Gives a module whose parameters are on the meta device memory for its part of them, and reads that from files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.parallel.layout import Layout
from shardwise.parallel.rows import local
from shardwise.workload.stored import StoredWeights


def materialize(root: nn.Module, device: torch.device) -> None:
    """Memory for all parameters of `root` where they are on meta; tied ones stay tied, buffers as they are."""
    if not any(parameter.is_meta for parameter in root.parameters()):
        return
    buffers = [(module, dict(module._buffers)) for module in root.modules()]
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects that they are
    try:
        root.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for module, kept in buffers:
        module._buffers.update(kept)


def read_weights(weights: StoredWeights, name: str, tensor: Tensor, layout: Layout) -> None:
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
