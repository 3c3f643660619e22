"""Stand-ins without data for parameters on the meta device, as if these were on the device of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map


@contextmanager
def stand_ins(model: nn.Module, batch: Any) -> Iterator[tuple[FakeTensorMode | None, Any]]:
    """Replace parameters on meta by tensors without data on the device of `batch` inside the context.

    Yields their FakeTensorMode and the batch as tensors of that mode; (None, batch) if no parameter is on meta.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield None, batch
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = [(module, key, p) for module in model.modules() for key, p in module._parameters.items() if p is not None]
    device = next((leaf.device for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)), "cpu")
    made: dict[nn.Parameter, nn.Parameter] = {}
    with mode:
        for _, _, parameter in held:
            if parameter.is_meta and parameter not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[parameter] = nn.Parameter(empty, parameter.requires_grad)
    for module, key, parameter in held:
        module._parameters[key] = made.get(parameter, parameter)
    try:
        yield mode, tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)
    finally:
        for module, key, parameter in held:
            module._parameters[key] = parameter
