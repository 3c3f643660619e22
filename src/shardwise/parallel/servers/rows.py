"""Gradients as contributions: tensors by name in which a matrix of mostly zero rows is sent as its other rows.

    g/NAME      a whole gradient
    i/NAME      numbers of the rows that are sent, and
    r/NAME      these rows; all others are zero

A gradient that is sparse in torch's sense (`sparse=True` of an embedding) stays one: its name is in `sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardwise.splitting.servers import WORTH_ROWS


def contribution(gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors to send for gradients by name, and the names of those that are sparse in torch's sense."""
    sent: dict[str, Tensor] = {}
    sparse = [name for name, gradient in gradients.items() if gradient.is_sparse]
    for name, gradient in gradients.items():
        if gradient.is_sparse:
            whole = gradient.coalesce()
            if whole.sparse_dim() != 1:
                whole = whole.to_dense().to_sparse(1)
            sent[f"i/{name}"], sent[f"r/{name}"] = whole.indices()[0], whole.values()
        elif (rows := used_rows(gradient)) is not None:
            sent[f"i/{name}"], sent[f"r/{name}"] = rows, gradient[rows]
        else:
            sent[f"g/{name}"] = gradient
    return sent, sparse


def used_rows(gradient: Tensor) -> Tensor | None:
    """Return the numbers of the rows of a matrix that are not zero. Returns None if sending all rows costs less."""
    if gradient.dim() != 2 or gradient.shape[0] < 2:
        return None
    used = gradient.ne(0).any(1)
    return used.nonzero()[:, 0] if int(used.sum()) < WORTH_ROWS * gradient.shape[0] else None


def mean(
    name: str,
    shape: Sequence[int],
    contributions: Sequence[tuple[float, Mapping[str, Tensor], Sequence[str]]],
) -> Tensor | None:
    """Return the weighted mean of the gradients of one parameter, summed in the given order.

    Args:
        name: name of the parameter.
        shape: its shape.
        contributions: weight, tensors and sparse names of each; one without the parameter counts as zero.

    Returns None if none of them has the parameter. The result is sparse if all that have it are.
    """
    total = sum(weight for weight, _, _ in contributions)
    parts = [
        (weight / total, tensors, name in sparse)
        for weight, tensors, sparse in contributions
        if f"g/{name}" in tensors or f"i/{name}" in tensors
    ]
    if not parts:
        return None
    if all(sparse for _, _, sparse in parts):
        rows = torch.cat([tensors[f"i/{name}"] for _, tensors, _ in parts])
        values = torch.cat([tensors[f"r/{name}"] * share for share, tensors, _ in parts])
        return torch.sparse_coo_tensor(rows[None], values, tuple(shape), check_invariants=True).coalesce()
    found: Tensor | None = None
    for share, tensors, _ in parts:
        if f"g/{name}" in tensors:
            given = tensors[f"g/{name}"]
            found = given * share if found is None else found.add_(given, alpha=share)
        else:
            rows, values = tensors[f"i/{name}"], tensors[f"r/{name}"]
            found = torch.zeros(tuple(shape), dtype=values.dtype) if found is None else found
            found.index_add_(0, rows, values, alpha=share)
    return found
