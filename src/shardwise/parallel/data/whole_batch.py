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
from shardwise.workload.pytree import map_tensors

_MOST_DIMENSIONS = 16
"""Numbers by which replicas compare their tensors: dimensions and sizes."""


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
            f"replicas can be joined only with samples along the first dimension of every tensor in the {what}: "
            f"for {max(samples, 1)} samples one has {sorted(rows)[0]}"
        )
    return map_tensors(lambda tensor: _joined(tensor[:samples], group), tree)


def _joined(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Join one tensor of all replicas; only our own part has a gradient."""
    if group is None:
        return own
    sizes = _sizes(own, group)
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[: own.shape[0]] = own.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    pieces = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    pieces[group.rank()] = own
    return torch.cat(pieces)


def _sizes(own: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Return the number of samples of every replica; all their tensors must be alike otherwise."""
    shape = torch.tensor([own.dim(), *own.shape][:_MOST_DIMENSIONS], device=own.device)
    padded = torch.cat([shape, shape.new_zeros(_MOST_DIMENSIONS - len(shape))])
    shapes = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(shapes, padded, group=group)
    found = [each.tolist() for each in shapes]
    for rank, other in enumerate(found):
        if [other[0], *other[2:]] != [found[0][0], *found[0][2:]]:
            first, second = (tuple(each[2 : 1 + each[0]]) for each in (found[0], other))
            raise WorkloadError(
                f"the samples of replicas 0 and {rank} have shapes {first} and {second}, so they cannot be joined: pad "
                "all to one shape"
            )
    return [int(each[1]) for each in found]
