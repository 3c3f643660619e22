"""Two versions of the weights of a worker's stages, for pipelines that do not wait for the end of a step.

Each backward pass computes with the weights of its forward pass while newer ones exist (Narayanan et al. 2021,
"Memory-Efficient Pipeline-Parallel DNN Training", section 3.1: double-buffered weight updates). A parameter's memory is
one of two buffers. Passes compute with a leaf of its own on each buffer, so that an update of the parameter is none of
what their backward passes have saved, and gradients of two steps stay apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Slot = tuple[nn.Module, str]
"""A module and the attribute under which it holds a parameter."""


class WeightVersions:
    """The newest weights of a worker's trained parameters, and those before the last update.

    Args:
        parameters: the parameters by name; they always have the newest weights.
        slots: name -> where passes find the parameter.

    Attributes:
        newest: index of the newest version, 0 or 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], slots: Mapping[str, Slot]) -> None:
        self.newest = 0
        self._parameters = parameters
        self._slots = {name: slots[name] for name in parameters}
        now = {name: nn.Parameter(parameter.data) for name, parameter in parameters.items()}
        self._leaves = now, {name: nn.Parameter(torch.empty_like(each.data)) for name, each in now.items()}
        self._used: int | None = None

    @property
    def older(self) -> int:
        """Return the index of the version before the newest one."""
        return 1 - self.newest

    def use(self, version: int | None) -> None:
        """Let passes compute with a version; None: with the parameters themselves."""
        if version == self._used:
            return
        self._used = version
        chosen = self._parameters if version is None else self._leaves[version]
        for name, (module, attribute) in self._slots.items():
            module._parameters[attribute] = chosen[name]

    def hand_over(self) -> None:
        """Give the parameters the gradients at the older weights, whose backward passes are over."""
        for name, leaf in self._leaves[self.older].items():
            self._parameters[name].grad = leaf.grad
            leaf.grad = None

    def advance(self) -> None:
        """Begin a version with equal values in place of the older one; updates of the parameters are updates of it."""
        older = self._leaves[self.older]
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                older[name].data.copy_(parameter.data)
                parameter.data = older[name].data
        self.newest = self.older

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights of both versions, and the gradients at them that exist."""
        leaves = [leaf for version in self._leaves for leaf in version.values()]
        return [leaf.data for leaf in leaves], [leaf.grad for leaf in leaves if leaf.grad is not None]

    def pending(self) -> dict[str, Tensor | None]:
        """Return the gradients at the older weights by name, which no update has used yet."""
        return {name: leaf.grad for name, leaf in self._leaves[self.older].items()}

    def fill_pending(self) -> dict[str, Tensor]:
        """Return `pending` with zeros in place of gradients that do not exist; they exist from then on."""
        for leaf in self._leaves[self.older].values():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        return {name: leaf.grad for name, leaf in self._leaves[self.older].items() if leaf.grad is not None}

    def keep_pending(self, names: frozenset[str]) -> None:
        """Drop the gradients at the older weights except those of `names`."""
        for name, leaf in self._leaves[self.older].items():
            if name not in names:
                leaf.grad = None
