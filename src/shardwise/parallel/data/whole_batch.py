"""Outputs of all replicas together, for a loss that needs the whole batch (contrastive losses, batch Dice).

Each replica computes the loss of the whole batch from its own outputs, which keep their graph, and from copies of the
outputs of the others. The gradient of its own outputs is then exact, and the sum over the replicas is that of one
process. Each replica computes the loss, but the model only on its own samples (as in SimCLR and CLIP).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import WorkloadError
from shardwise.parallel.state.pytree import map_tensors


def of_all_replicas(tree: Any, samples: int, group: dist.ProcessGroup | None, what: str) -> Any:
    """Join the tensors of all replicas along their first dimension, samples in the order of the batch. Collective.

    Args:
        tree: output or batch of this replica, in which every tensor has its samples along the first dimension.
        samples: number of samples that count; 0 for a dummy sample.
        group: the replicas; None: this one alone.
        what: name of the tree in errors.

    Raises:
        WorkloadError: a tensor has no first dimension of samples.
    """
    rows: set[int] = set()

    def check(tensor: Tensor) -> Tensor:
        rows.add(tensor.shape[0] if tensor.dim() else -1)
        return tensor

    map_tensors(check, tree)
    if rows - {max(samples, 1)}:
        raise WorkloadError(
            f"whole_batch needs samples along the first dimension of every tensor in the {what}: "
            f"for {max(samples, 1)} samples one has {sorted(rows)[0]}"
        )
    return map_tensors(lambda tensor: _joined(tensor[:samples], group), tree)


def _joined(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Join one tensor of all replicas; only our own part has a gradient."""
    if group is None:
        return own
    count = torch.tensor([own.shape[0]], device=own.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    sizes = [int(each) for each in counts]
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[: own.shape[0]] = own.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    pieces = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    pieces[group.rank()] = own
    return torch.cat(pieces)
