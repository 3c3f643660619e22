"""Broadcast whole tensors from one worker of a group to the others, many in one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _broadcast_coalesced

from shardwise.splitting.ownership import BUCKET_BYTES


def broadcast(tensors: Sequence[Tensor], group: dist.ProcessGroup, source: int) -> None:
    """Overwrite `tensors` with those of worker `source` of the group, many per message. Collective."""
    if tensors:
        with torch.no_grad():
            _broadcast_coalesced(group, list(tensors), BUCKET_BYTES, source)
