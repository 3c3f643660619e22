"""Layers that a model repeats, so that it can be analysed with a few of them.

    layers = repeated_layers(model)      of GPT(layers=96, ...), on the meta device, say
    with shortened(layers, 2):           inside, the model has two layers

Layers are equal if their classes, their parameters and buffers (shapes, dtypes, whether they are trained), and their
plain attributes are equal, recursively; an attribute that counts the layers (`layer_idx`) may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_COUNTS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx"})
_PLAIN = (int, float, str, bool, type(None))

Signature = tuple[Any, ...]


def signature(module: nn.Module) -> Signature:
    """Return a value that is equal for modules of equal structure, whatever the values of their tensors."""
    attributes = tuple(sorted((k, repr(v)) for k, v in vars(module).items() if k not in _COUNTS and _is_plain(v)))
    tensors = [*module._parameters.items(), *module._buffers.items()]
    shapes = tuple((name, None if tensor is None else _shape(tensor)) for name, tensor in tensors)
    children = tuple((n, None if child is None else signature(child)) for n, child in module._modules.items())
    return type(module), module.extra_repr(), attributes, shapes, children


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return isinstance(value, _PLAIN)


def _shape(tensor: Tensor) -> Signature:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad


def repeated_layers(model: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """Return the longest list of three or more equal layers that share no parameters. Returns None if there is none."""
    best: nn.ModuleList | nn.Sequential | None = None
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 3:
            continue
        if (best is None or len(module) > len(best)) and _equal(list(module)):
            best = module
    return best


def _equal(layers: Sequence[nn.Module]) -> bool:
    first = signature(layers[0])
    parameters = [id(parameter) for layer in layers for parameter in layer.parameters()]
    return bool(parameters) and len(set(parameters)) == len(parameters) and all(signature(x) == first for x in layers)


@contextmanager
def shortened(layers: nn.ModuleList | nn.Sequential, count: int) -> Iterator[None]:
    """Remove all but the first `count` layers inside the context."""
    kept = dict(layers._modules)
    for name in list(kept)[count:]:
        del layers._modules[name]
    try:
        yield
    finally:
        layers._modules.clear()
        layers._modules.update(kept)
