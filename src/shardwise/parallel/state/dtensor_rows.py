"""Tensors of which a worker holds some rows: torch's DTensor, as `fully_shard` creates them.

Importing DTensor takes most of a second, and no tensor is one before `fully_shard` has been imported. So this module
does not import it just to check.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.state.layout import Layout


def is_split(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, of which only some rows are held here."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that is held here, detached. It shares the tensor's memory."""
    if not is_split(tensor):
        whole: Tensor = tensor.detach()
        return whole
    with torch.no_grad():
        part: Tensor = tensor.to_local()
        return part


def row_layout(tensor: Any) -> Layout:
    """Return the layout of the local part of a tensor: the rows of a DTensor, all of a plain tensor."""
    whole = Layout.whole(tensor.shape)
    if not is_split(tensor):
        return whole
    mesh = tensor.device_mesh
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            size = -(-tensor.shape[0] // mesh.size(axis))
            start = min(mesh.get_local_rank(axis) * size, tensor.shape[0])
            return whole.rows(start, min(start + size, tensor.shape[0]))
    return whole
