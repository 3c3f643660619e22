"""Values of one rank for all: parameters, the state of an optimizer, and plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.compat.horovod import operations
from shardwise.compat.horovod.objects import decode, encode
from shardwise.compat.horovod.world import ProcessSet, global_process_set, rank


def broadcast_parameters(
    params: Mapping[str, Tensor] | Iterable[Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Replace parameters on all ranks by those of rank `root_rank`.

    Args:
        params: `model.state_dict()`, `model.named_parameters()`, or tensors.
        root_rank: rank that has the values.
        process_set: ranks that take part.

    Raises:
        ValueError: `params` is something else.
    """
    if isinstance(params, Mapping):
        pairs = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, str | Tensor):
        pairs = [each if isinstance(each, tuple) else (f"{number}", each) for number, each in enumerate(params)]
    else:
        raise ValueError(f"params must be a state dict or a list of parameters, not a {type(params).__name__}")
    wrong = next((name for name, value in pairs if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise ValueError(f"params: {wrong!r} is no tensor: send it with broadcast_object")
    handles = [
        operations.broadcast_async_(value, root_rank, f"broadcast_parameters.{name}", process_set)
        for name, value in pairs
    ]
    for handle in handles:
        operations.synchronize(handle)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: nn.Module | None = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Replace the state and the options of an optimizer on all ranks by those of rank `root_rank`.

    Args:
        optimizer: an optimizer, distributed or not.
        root_rank: rank that has the values.
        model: not needed: in Horovod it says which parameters have sparse gradients.
        process_set: ranks that take part.

    Raises:
        RequestError: the state holds something that is no tensor and no plain value.
    """
    state = broadcast_object(optimizer.state_dict(), root_rank, "optimizer_state", process_set)
    if rank() != root_rank:
        optimizer.load_state_dict(state)


def broadcast_object(
    obj: Any = None, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Return the plain value `obj` of rank `root_rank`.

    Args:
        obj: None, numbers, text, bytes, lists, tuples, sets, dicts, tensors and arrays of numbers, in each other;
            other ranks may give anything.
        root_rank: rank that has the value.
        name: name of the message.
        process_set: ranks that take part.

    Raises:
        RequestError: the value is not plain; nothing is pickled.
    """
    name = name or "broadcast_object"
    data = encode(obj) if rank() == root_rank else b""
    size = operations.broadcast_(torch.tensor([len(data)]), root_rank, f"{name}.size", process_set)
    sent = _tensor(data) if rank() == root_rank else torch.empty(int(size), dtype=torch.uint8)
    operations.broadcast_(sent, root_rank, f"{name}.data", process_set)
    return obj if rank() == root_rank else decode(bytes(sent.numpy()))


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Return the plain values of all ranks, in the order of the ranks. Raises RequestError as `broadcast_object`."""
    name = name or "allgather_object"
    data = _tensor(encode(obj))
    sizes = operations.allgather(torch.tensor([len(data)]), f"{name}.size", process_set).tolist()
    gathered = operations.allgather(data, f"{name}.data", process_set)
    return [decode(bytes(part.numpy())) for part in gathered.split(sizes)]  # type: ignore[no-untyped-call]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
