"""Mixed precision in a graph as around a module call: autocast to bfloat16 for the module, float32 for the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.parallel.tensor.partitioner import bound


def widen_loss(graph: fx.Graph, device: torch.device) -> None:
    """Make the calls of a graph outside the module compute in float32 even under autocast. Changes `graph` in place.

    What the module gives is converted once, before its first use outside: a change in place of one view of it must be
    seen by the others.
    """
    wide: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.meta.get("outside"):
            continue
        for given in node.all_input_nodes:
            if _may_be_narrow(given):
                wide[given] = wide.get(given) or _converted(graph, given, node)
                node.replace_input_with(given, wide[given])
        node.target = _without_autocast(device, node.target)


def _may_be_narrow(node: fx.Node) -> bool:
    """Return whether a value comes from the module and is computed in bfloat16 under autocast."""
    dtype = node.meta.get("dtype")
    return node.op == "call_function" and not node.meta.get("outside") and dtype is not None and dtype.is_floating_point


def _converted(graph: fx.Graph, given: fx.Node, user: fx.Node) -> fx.Node:
    with graph.inserting_before(user):
        node = graph.call_function(_widened, (given,))
    node.meta.update(given.meta, outside=True, module=user.meta.get("module"))
    return node


def _without_autocast(device: torch.device, target: Callable[..., Any]) -> Callable[..., Any]:
    """Bind a call to run without autocast. It keeps the schema and tags by which changes in place are recognised."""
    function = bound(_plain, device.type, target)
    for attribute in ("_schema", "tags"):
        if hasattr(target, attribute):
            setattr(function, attribute, getattr(target, attribute))
    return function


def _plain(device: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device, enabled=False):
        return function(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
