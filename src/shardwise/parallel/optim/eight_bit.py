"""Optimizer states in 8 bits between steps (`states=8`): the states of one parameter at a time are float32.

for each parameter    widen its states, let the optimizer update it alone, narrow them again
small parameters      all at once, with states that stay float32
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import StrategyError
from shardwise.parallel.optim.block_codes import LEAST, BlockCodec, BlockCodes, can_narrow
from shardwise.parallel.optim.making import Several, name_of, parts_of
from shardwise.parallel.optim.nature import BY_ELEMENT


class EightBitStates:
    """States of an optimizer's parameters as codes, wherever they are float32 and of the parameter's shape.

    Args:
        optimizer: updates each element of a parameter from that element alone; see `check_states`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.codec = BlockCodec()
        self.narrow()

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        groups = [group for part in _stepped(self._optimizer) for group in part.param_groups]
        members = [list(group["params"]) for group in groups]
        with self._updating(groups, [[p for p in some if p.numel() < LEAST] for some in members]):
            self._optimizer.step()
        for number, some in enumerate(members):
            for parameter in some:
                if parameter.numel() < LEAST or parameter.grad is None:
                    continue
                self._widen(parameter)
                with self._updating(groups, [[parameter] if each == number else [] for each in range(len(groups))]):
                    self._optimizer.step()
                self._narrow(parameter)

    def narrow(self) -> None:
        """Narrow all states that are float32."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._narrow(parameter)

    @contextmanager
    def _updating(self, groups: Sequence[dict[str, Any]], chosen: Iterable[list[Tensor]]) -> Iterator[None]:
        """Let groups have these parameters alone inside the block."""
        before = [group["params"] for group in groups]
        for group, some in zip(groups, chosen, strict=True):
            group["params"] = some
        try:
            yield
        finally:
            for group, every in zip(groups, before, strict=True):
                group["params"] = every

    def _widen(self, parameter: Tensor) -> None:
        state = self._optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, BlockCodes):
                state[key] = self.codec.widen(value)

    def _narrow(self, parameter: Tensor) -> None:
        state = self._optimizer.state.get(parameter, {})
        for key in state:
            if can_narrow(state[key], parameter):
                state[key] = self.codec.narrow(state[key].to(parameter.device))


def check_states(optimizer: torch.optim.Optimizer, workload: str) -> None:
    """Check that an optimizer can update one parameter at a time, and has states to narrow.

    Args:
        optimizer: the optimizer.
        workload: name of the workload.

    Raises:
        StrategyError: it cannot, or has none.
    """
    what = f"states=8: {name_of(optimizer)}, the optimizer of workload {workload!r},"
    if any(type(part) not in BY_ELEMENT for part in parts_of(optimizer)):
        names = ", ".join(sorted(each.__name__ for each in BY_ELEMENT))
        raise StrategyError(f"{what} may update parameters together; use one of torch's {names}")
    groups = [group for part in parts_of(optimizer) for group in part.param_groups]
    if all(isinstance(p, torch.optim.SGD) for p in parts_of(optimizer)) and not any(g["momentum"] for g in groups):
        raise StrategyError(f"{what} keeps no states without momentum: leave states out")


def _stepped(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.stepped if isinstance(optimizer, Several) else (optimizer,)
