"""Mixed precision in a graph as around a module call: autocast to bfloat16 for the module, float32 for the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.parallel.state.pytree import map_tensors
from shardwise.parallel.tensor.partitioner import bound


def widen_loss(graph: fx.Graph, device: torch.device) -> None:
    """Make the calls of a graph outside the module compute in float32 even under autocast. Changes `graph` in place."""
    for node in graph.nodes:
        if node.op == "call_function" and node.meta.get("outside"):
            node.target = bound(_wide, device.type, node.target)


def _wide(device: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device, enabled=False):
        return function(*map_tensors(_widened, args), **map_tensors(_widened, kwargs))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
