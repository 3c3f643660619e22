"""ZeRO-1: each replica updates some parameters and broadcasts them to the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.state.broadcast import broadcast
from shardwise.splitting.ownership import assign_owners


class OwnedParameters:
    """ZeRO-1: each replica updates the parameters assigned to it and broadcasts them to the others.

    Whole parameters are assigned, not slices. Every optimizer that treats parameters one by one therefore works
    unchanged, even one that uses a parameter's shape or norm.

    Attributes:
        mine: names of the parameters that this replica updates; may be empty.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        owners = assign_owners({name: parameter.numel() for name, parameter in parameters.items()}, group.size())
        self.mine = [name for name in parameters if owners[name] == group.rank()]
        self._group = group
        self._by_owner: list[list[Tensor]] = [[] for _ in range(group.size())]
        for name, parameter in parameters.items():
            self._by_owner[owners[name]].append(parameter.detach())

    def exchange(self) -> None:
        """Broadcast every replica's updated parameters to all others. Collective over the replicas."""
        for owner, tensors in enumerate(self._by_owner):
            broadcast(tensors, self._group, owner)
