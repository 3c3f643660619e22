"""Parameters that the optimizer updates: plain tensors of this worker's rows in place of DTensors.

An optimizer over DTensors derives the placement of the result for every operation on every parameter, which takes
longer than a small model's whole backward pass. If each element is updated by itself, the local rows can be updated as
plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from shardwise.parallel.state.dtensor_rows import is_split, local

BY_ELEMENT = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)
"""Optimizers that update each element from that element alone. Others may need norms of whole parameters."""


class Shards:
    """Parameters of an optimizer, which share the memory of the model's parameters.

    Args:
        parameters: the model's parameters by name; DTensors or plain.
        make: the workload's function from parameters to an optimizer.

    Attributes:
        optimizer: the optimizer over `parameters`.
        parameters: the updated parameters by name: the model's, or plain ones in place of DTensors.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], make: Callable[[Iterable[Any]], torch.optim.Optimizer]
    ) -> None:
        self.optimizer = make(list(parameters.values()))
        self.parameters = dict(parameters)
        self._split: list[tuple[nn.Parameter, nn.Parameter]] = []
        if type(self.optimizer) not in BY_ELEMENT or not any(map(is_split, parameters.values())):
            return
        for name, parameter in parameters.items():
            if is_split(parameter):
                rows = nn.Parameter(local(parameter), requires_grad=parameter.requires_grad)
                self._split.append((parameter, rows))
                self.parameters[name] = rows
        self.optimizer = make(list(self.parameters.values()))

    def step(self) -> None:
        """Run an optimizer step on the current gradients."""
        for parameter, rows in self._split:  # the first forward pass may have moved them
            rows.data = local(parameter)
            rows.grad = None if parameter.grad is None else local(parameter.grad)
        self.optimizer.step()
        for _, rows in self._split:
            rows.grad = None
