"""Collectives of `horovod.torch`: in place or not, at once or with a handle, of one tensor or of a group.

Gradients pass through those that are not in place: the gradient of a sum is summed, that of an average averaged, and
each rank gets that of its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.compat.horovod.compression import Compressions, Compressor
from shardwise.compat.horovod.execution import share_of
from shardwise.compat.horovod.negotiation import CollectiveHandle
from shardwise.compat.horovod.requests import (
    ADASUM,
    AVERAGE,
    MAX,
    MIN,
    PRODUCT,
    SUM,
    CollectiveRequest,
    HorovodInternalError,
)
from shardwise.compat.horovod.world import ProcessSet, global_process_set, negotiator_of
from shardwise.errors import RequestError

Average, Sum, Adasum, Min, Max, Product = AVERAGE, SUM, ADASUM, MIN, MAX, PRODUCT
"""Reductions: the mean over the ranks, their sum, adaptive summation, the extremes, the product."""

OPS = (AVERAGE, SUM, ADASUM, MIN, MAX, PRODUCT)


def _ask(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    targets: Sequence[Tensor] | None = None,
    form: str = "one",
    **fields: Any,
) -> CollectiveHandle:
    """Ask for a collective and return its handle. Raises ValueError or HorovodInternalError for unfit tensors."""
    negotiator = negotiator_of(process_set)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise HorovodInternalError(
            f"{kind}: the tensors of a group must be on one device, these are on {sorted(map(str, devices))}"
        )
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise ValueError(f"{kind} of a sparse tensor: send its indices and values, or to_dense()")
        if not tensor.dim() and kind in ("allgather", "alltoall", "reducescatter"):
            raise HorovodInternalError(f"{kind} of a tensor without dimensions: give it one, as with tensor.view(1)")
    request = CollectiveRequest(
        kind,
        name or negotiator.auto_name(kind),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        device=next(iter(devices)).type if devices else "cpu",
        **fields,
    )
    handle = CollectiveHandle(request, [tensor.detach() for tensor in tensors], targets, form)
    negotiator.ask(handle)
    return handle


def _reduction(op: str | None, average: bool | None) -> str:
    """Return the reduction that is asked for; `average` is the older way to say it. Raises ValueError."""
    if op is None:
        return SUM if average is False else AVERAGE
    if average is not None:
        raise ValueError("op and average are given: leave out average, op says it")
    if op not in OPS:
        raise ValueError(f"op={op!r}: known are {', '.join(OPS)}")
    return op


def poll(handle: CollectiveHandle) -> bool:
    """Return whether a collective has ended, so that `synchronize` would not wait."""
    return handle.done


def synchronize(handle: CollectiveHandle) -> Any:
    """Wait for a collective and return its result: a tensor, a list for a group, (rows, splits) for an all-to-all.

    Raises:
        HorovodInternalError: the ranks do not agree about it, or one of them is gone.
    """
    outputs = handle.wait()
    if handle.form == "list":
        return list(outputs)
    return tuple(outputs) if handle.form == "pair" else (outputs[0] if outputs else None)


class _Reduced(torch.autograd.Function):
    """Sum or mean over the ranks of one tensor or a group; so are the gradients."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, fields: dict[str, Any], name: str, *tensors: Tensor) -> Any:
        ctx.asked = process_set, fields, f"{name}.grad"
        return tuple(_ask("allreduce", tensors, name, process_set, **fields).wait())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        process_set, fields, name = ctx.asked
        if fields["op"] not in (SUM, AVERAGE):
            raise RequestError(f"an all-reduce with op={fields['op']} has no gradient: use Sum or Average, or detach()")
        return None, None, None, *_Reduced.apply(process_set, fields, name, *gradients)  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    """Rows of all ranks; the gradient is the mean over the ranks of those of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, name: str, *tensors: Tensor) -> Any:
        ctx.asked = process_set, f"{name}.grad"
        handle = _ask("allgather", tensors, name, process_set)
        ctx.rows = [tensor.shape[0] for tensor in tensors]
        return tuple(handle.wait())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        process_set, name = ctx.asked
        means = grouped_allreduce(gradients, name=name, process_set=process_set)
        rows = allgather(torch.tensor([ctx.rows]), name=f"{name}.rows", process_set=process_set)
        starts = rows[: process_set.rank()].sum(0).tolist()
        own = [mean.narrow(0, start, rows) for mean, start, rows in zip(means, starts, ctx.rows, strict=True)]
        return None, None, *own


class _Broadcast(torch.autograd.Function):
    """Tensor of the root rank; its gradient is the mean over the ranks, that of the others is 0."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, root: int, name: str, tensor: Tensor) -> Any:
        ctx.asked = process_set, root, f"{name}.grad"
        return _ask("broadcast", [tensor], name, process_set, root=root).wait()[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        process_set, root, name = ctx.asked
        mean = allreduce(gradient, name=name, process_set=process_set)
        return None, None, None, mean if global_process_set.rank() == root else torch.zeros_like(mean)


class _Exchanged(torch.autograd.Function):
    """Rows that the ranks send to each other; gradients travel back the same way."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, splits: Any, name: str, tensor: Tensor) -> Any:
        received, counts = synchronize(alltoall_async(tensor, splits, name, process_set))
        ctx.asked = process_set, counts, f"{name}.grad", tensor.shape[0]
        ctx.mark_non_differentiable(counts)
        return received, counts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        process_set, counts, name, rows = ctx.asked
        back, _ = alltoall(gradient, counts, name, process_set)
        unsent = back.new_zeros(rows - back.shape[0], *back.shape[1:])
        return None, None, None, torch.cat([back, unsent])


class _Scattered(torch.autograd.Function):
    """This rank's rows of a sum or mean; the gradients of all rows are gathered, and summed if the rows were."""

    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, fields: dict[str, Any], name: str, *tensors: Tensor) -> Any:
        ctx.asked = process_set, fields, f"{name}.grad"
        return tuple(_ask("reducescatter", tensors, name, process_set, **fields).wait())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        process_set, fields, name = ctx.asked
        if fields["op"] not in (SUM, AVERAGE):
            raise RequestError(
                f"a reduce-scatter with op={fields['op']} has no gradient: use Sum or Average, or detach()"
            )
        factor = fields["prescale"] * fields["postscale"] * (process_set.size() if fields["op"] == SUM else 1)
        gathered = grouped_allgather(gradients, name=name, process_set=process_set)
        return None, None, None, *(gradient * factor for gradient in gathered)


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> CollectiveHandle:
    """Begin an all-reduce and return its handle; `tensor` stays as it is."""
    fields = _factors(op, average, prescale_factor, postscale_factor)
    return _ask("allreduce", [tensor], name, process_set, **fields)


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> CollectiveHandle:
    """Begin an all-reduce in place and return its handle."""
    fields = _factors(op, average, prescale_factor, postscale_factor)
    return _ask("allreduce", [tensor], name, process_set, targets=[tensor], **fields)


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compressions.none,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks and return the result; gradients pass.

    Args:
        tensor: the tensor, of the same shape and dtype on all ranks.
        average: older form of `op`: True is Average, False is Sum.
        name: name by which the ranks find each other's tensors; None: by the order of the calls.
        compression: how the tensor is sent.
        op: Average (None too), Sum, Min, Max, Product or Adasum.
        prescale_factor: factor of the tensor before the reduction.
        postscale_factor: factor of the result.
        process_set: ranks that take part.

    Raises:
        HorovodInternalError: the ranks do not agree about shape, dtype or reduction, or one of them is gone.
    """
    fields = _factors(op, average, prescale_factor, postscale_factor)
    sent, context = compression.compress(tensor)
    name = name or negotiator_of(process_set).auto_name("allreduce")
    (reduced,) = _Reduced.apply(process_set, fields, name, sent)  # type: ignore[no-untyped-call]
    return compression.decompress(reduced, context)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks in place and return it."""
    synchronize(allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set))
    return tensor


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> CollectiveHandle:
    """Begin an all-reduce of several tensors at once and return its handle."""
    fields = _factors(op, average, prescale_factor, postscale_factor)
    return _ask("allreduce", tensors, name, process_set, form="list", **fields)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> CollectiveHandle:
    """Begin an all-reduce of several tensors at once, in place, and return its handle."""
    fields = _factors(op, average, prescale_factor, postscale_factor)
    return _ask("allreduce", tensors, name, process_set, targets=tensors, form="list", **fields)


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compressions.none,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors over all ranks at once and return the results; gradients pass."""
    fields = _factors(op, average, prescale_factor, postscale_factor)
    compressed = [compression.compress(tensor) for tensor in tensors]
    name = name or negotiator_of(process_set).auto_name("allreduce")
    reduced = _Reduced.apply(process_set, fields, name, *(sent for sent, _ in compressed))  # type: ignore[no-untyped-call]
    return [compression.decompress(one, context) for one, (_, context) in zip(reduced, compressed, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors over all ranks at once, in place, and return them."""
    synchronize(grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set))
    return list(tensors)


def allgather_async(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> CollectiveHandle:
    """Begin an all-gather and return its handle."""
    return _ask("allgather", [tensor], name, process_set)


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, which may differ; gradients pass."""
    name = name or negotiator_of(process_set).auto_name("allgather")
    (gathered,) = _Gathered.apply(process_set, name, tensor)  # type: ignore[no-untyped-call]
    whole: Tensor = gathered
    return whole


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> CollectiveHandle:
    """Begin an all-gather of several tensors and return its handle."""
    return _ask("allgather", tensors, name, process_set, form="list")


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """Concatenate each of several tensors over all ranks; gradients pass."""
    name = name or negotiator_of(process_set).auto_name("allgather")
    return list(_Gathered.apply(process_set, name, *tensors))  # type: ignore[no-untyped-call]


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> CollectiveHandle:
    """Begin a broadcast and return its handle; `tensor` stays as it is."""
    return _ask("broadcast", [tensor], name, process_set, root=root_rank)


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> CollectiveHandle:
    """Begin a broadcast in place and return its handle."""
    return _ask("broadcast", [tensor], name, process_set, targets=[tensor], root=root_rank)


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Return the tensor of rank `root_rank`; gradients pass to it."""
    name = name or negotiator_of(process_set).auto_name("broadcast")
    received: Tensor = _Broadcast.apply(process_set, root_rank, name, tensor)  # type: ignore[no-untyped-call]
    return received


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Replace the values of a tensor by those of rank `root_rank` and return it."""
    synchronize(broadcast_async_(tensor, root_rank, name, process_set))
    return tensor


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> CollectiveHandle:
    """Begin an all-to-all and return its handle, whose result is (rows, received splits).

    Raises:
        ValueError: the splits are no int32 numbers, one per rank, or do not fit the tensor.
    """
    return _ask("alltoall", [tensor], name, process_set, form="pair", splits=_splits(tensor, splits, process_set))


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows of a tensor to each rank and return those that all ranks send to this one; gradients pass.

    Args:
        tensor: rows to send, those for rank 0 first.
        splits: number of rows for each rank, int32; None: as many for each, and only the rows are returned.
        name: as in `allreduce`.
        process_set: ranks that take part.

    Raises:
        ValueError: as in `alltoall_async`.
    """
    name = name or negotiator_of(process_set).auto_name("alltoall")
    received, counts = _Exchanged.apply(process_set, splits, name, tensor)  # type: ignore[no-untyped-call]
    return received if splits is None else (received, counts)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: str | None = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> CollectiveHandle:
    """Begin a reduce-scatter and return its handle."""
    fields = _scattering(op, prescale_factor, postscale_factor)
    return _ask("reducescatter", [tensor], name, process_set, **fields)


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compressions.none,
    op: str | None = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Reduce a tensor over all ranks and return this rank's rows of it; gradients pass.

    The first ranks get one row more if the rows cannot be shared evenly.
    """
    return grouped_reducescatter([tensor], name, compression, op, process_set, prescale_factor, postscale_factor)[0]


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: str | None = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> CollectiveHandle:
    """Begin a reduce-scatter of several tensors and return its handle."""
    fields = _scattering(op, prescale_factor, postscale_factor)
    return _ask("reducescatter", tensors, name, process_set, form="list", **fields)


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compressions.none,
    op: str | None = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """Reduce several tensors over all ranks and return this rank's rows of each; gradients pass."""
    fields = _scattering(op, prescale_factor, postscale_factor)
    compressed = [compression.compress(tensor) for tensor in tensors]
    name = name or negotiator_of(process_set).auto_name("reducescatter")
    scattered = _Scattered.apply(process_set, fields, name, *(sent for sent, _ in compressed))  # type: ignore[no-untyped-call]
    return [compression.decompress(one, context) for one, (_, context) in zip(scattered, compressed, strict=True)]


def sparse_allreduce_async(
    tensor: Tensor, name: str, op: str, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Begin to reduce a sparse tensor over all ranks; the returned function waits for the result and returns it.

    Args:
        tensor: the sparse tensor.
        name: name by which the ranks find each other's tensors.
        op: Average or Sum.
        process_set: ranks that take part.

    Raises:
        ValueError: another `op`, which zeros between the values would change.
    """
    if op not in (AVERAGE, SUM):
        raise ValueError(f"sparse all-reduce with op={op!r}: must be Average or Sum")
    coalesced, divisor = tensor.detach().coalesce(), process_set.size() if op == AVERAGE else 1
    handles = (
        allgather_async(coalesced.indices().t().contiguous(), f"{name}.indices", process_set),
        allgather_async(coalesced.values(), f"{name}.values", process_set),
    )

    def result() -> Tensor:
        indices, values = (synchronize(handle) for handle in handles)
        return torch.sparse_coo_tensor(indices.t(), values / divisor, tensor.shape).coalesce()

    return result


def join(device: int = -1) -> int:
    """Take part with zeros in the all-reduces of ranks that still have data, until all have joined; collective.

    Args:
        device: GPU for the zeros, which must be the current one; -1: whatever is.

    Returns:
        The rank that joined last.
    """
    if device >= 0 and torch.cuda.is_available():
        torch.cuda.set_device(device)
    return negotiator_of(global_process_set).join()


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until all ranks of a process set have called this."""
    synchronize(_ask("barrier", [], None, process_set))


def _factors(op: str | None, average: bool | None, prescale: float, postscale: float) -> dict[str, Any]:
    return {"op": _reduction(op, average), "prescale": float(prescale), "postscale": float(postscale)}


def _scattering(op: str | None, prescale: float, postscale: float) -> dict[str, Any]:
    if op == ADASUM:
        raise HorovodInternalError("reducescatter with op=Adasum is not possible: use allreduce, or Average")
    return _factors(op, None, prescale, postscale)


def _splits(tensor: Tensor, splits: Tensor | Sequence[int] | None, process_set: ProcessSet) -> tuple[int, ...]:
    """Return the number of rows for each rank. Raises ValueError."""
    count, rows = process_set.size(), tensor.shape[0] if tensor.dim() else 0
    if splits is None:
        if rows % count:
            raise ValueError(f"alltoall of {rows} rows to {count} ranks without splits: the ranks must divide the rows")
        return tuple(share_of(rows, count, place)[1] for place in range(count))
    if isinstance(splits, Tensor) and splits.dtype != torch.int32:
        raise ValueError(f"alltoall: splits of dtype {splits.dtype}: must be int32")
    numbers = tuple(int(each) for each in (splits.tolist() if isinstance(splits, Tensor) else splits))
    if len(numbers) != count or min(numbers, default=0) < 0 or sum(numbers) > rows:
        raise ValueError(
            f"alltoall of {rows} rows with splits {list(numbers)}: there must be {count} of them, one per rank, that "
            "add up to the rows at most"
        )
    return numbers
