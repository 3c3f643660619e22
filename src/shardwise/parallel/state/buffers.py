"""Keep the buffers of a model equal on all replicas, and keep them the same tensor objects."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.state.broadcast import broadcast
from shardwise.parallel.state.build_model import persistent_buffers
from shardwise.parallel.state.gather import gather_json
from shardwise.workload.pytree import facts


class ReplicaBuffers:
    """Buffers of which every replica of `group` has a copy (None: there is one replica).

    Batch norm's statistics are equal on all replicas anyway, and so are counters. A buffer that a forward pass changes
    in another way follows the samples of its replica. Such buffers are found after the first step. As under DDP, the
    first replica then broadcasts them in every step.

    Attributes:
        notes: what the user should know, one line each.
    """

    def __init__(self, buffers: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
        self.notes: list[str] = []
        self._buffers = buffers
        self._group = group
        self._versions = {name: buffer._version for name, buffer in buffers.items()}
        self._drifting: list[Tensor] | None = None

    def settle(self) -> None:
        """Make the buffers equal after the passes of a step. Collective over the replicas."""
        if self._group is None:
            return
        if self._drifting is None:
            with facts():
                self._drifting = self._find_drifting(self._group)
        broadcast(self._drifting, self._group, 0)

    def _find_drifting(self, group: dist.ProcessGroup) -> list[Tensor]:
        """Return the buffers that changed and differ between replicas. Collective."""
        digests = {
            name: _digest(buffer) for name, buffer in self._buffers.items() if buffer._version != self._versions[name]
        }
        device = next((buffer.device for buffer in self._buffers.values()), None)
        if device is None:
            return []
        everybody = gather_json(digests, group, device)
        names = [n for n in self._buffers if len({digests.get(n) for digests in everybody}) > 1]
        self.notes += [
            f"buffer {name} follows the samples of a replica: all take the first one's, which differs from one worker's"
            for name in names
        ]
        return [self._buffers[name] for name in names]


class Buffers(ReplicaBuffers):
    """Persistent buffers of a model that is trained on the replicas of `group`.

    Attributes:
        persistent: the buffers by name. If the model assigns a new tensor, it is copied into the old one.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.persistent = persistent_buffers(model)
        self._owners = [(model.get_submodule(name.rpartition(".")[0]), name) for name in self.persistent]
        super().__init__(self.persistent, group)

    def settle(self) -> None:
        """Copy newly assigned buffers into the old ones, and make all buffers equal. Collective over the replicas."""
        for module, name in self._owners:
            key, buffer = name.rpartition(".")[2], self.persistent[name]
            assigned = module._buffers.get(key)
            if assigned is not buffer and assigned is not None and assigned.shape == buffer.shape:
                buffer.copy_(assigned.detach())
                module._buffers[key] = buffer
        super().settle()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
