"""Moving average of the trained parameters, of which each worker keeps the part that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.layout import TensorPiece, TensorPlacement


class Average:
    """Exponential moving average of parameters, as torch's `AveragedModel` with `get_ema_multi_avg_fn` computes it.

    Each element is averaged by itself, so the average of a part is the part of the average.

    Args:
        parameters: trained parameters held here, by name.
        decay: weight of the earlier average in a new one, 0 to 1.

    Attributes:
        begun: whether the average has taken in an update; the first one replaces it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.begun = False
        self._parameters = parameters
        self._means = {name: local(parameter).clone() for name, parameter in parameters.items()}
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self, names: AbstractSet[str]) -> None:
        """Take in the parameters after an update of those in `names`; the first time all, whatever was updated."""
        taken = [name for name in self._means if name in names or not self.begun]
        means, now = [self._means[name] for name in taken], [local(self._parameters[name]) for name in taken]
        if means and self.begun:
            self._average(means, now, None)
        elif means:
            torch._foreach_copy_(means, now)
        self.begun = True  # on a worker without parameters too: it may be the one that writes the state

    def pieces(self, held: Mapping[str, TensorPlacement]) -> list[TensorPiece]:
        """Return the piece `average/<parameter>` of each mean."""
        return [TensorPiece(f"average/{n}", mean, held[n].layout, held[n].writes) for n, mean in self._means.items()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters have their average values inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self._means.items():
            parameter: Tensor = local(self._parameters[name])
            before = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(before)
