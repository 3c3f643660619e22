"""Collectives of shardwise.compat.horovod, after the list of Horovod's own tests (test/parallel/test_torch.py).

Each test runs on workers that all have the same numbers, so that results are known: n equal tensors sum up to n times
one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pool import Pools
from torch import Tensor

import shardwise.compat.horovod as hvd
from shardwise.errors import RequestError

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRAINED = (torch.float32, torch.float64)
SIDE = 5


def started(function: Callable[..., Any], *args: Any) -> Any:
    hvd.init()
    result = function(*args)
    hvd.shutdown()
    return result


def numbers(dims: int, dtype: torch.dtype = torch.float32, rows: int = SIDE, seed: int = 1234) -> Tensor:
    """Whole numbers that are the same on all ranks, small enough for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 8, (rows, *[SIDE] * (dims - 1)), generator=generator).to(dtype)


def cases(dtypes: tuple[torch.dtype, ...] = (*WHOLE, *FLOATS)) -> Any:
    return itertools.product(dtypes, (1, 2, 3))


def ranks() -> None:
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size()) == (torch.distributed.get_rank(), torch.distributed.get_world_size())
    assert (hvd.local_rank(), hvd.local_size()) == (hvd.rank(), hvd.size())  # one host
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert hvd.is_homogeneous()
    hvd.shutdown()
    assert not hvd.is_initialized()
    with pytest.raises(ValueError, match="has not been initialized"):
        hvd.size()
    hvd.init(process_sets="dynamic")
    assert hvd.is_initialized()


def reductions() -> None:
    size = hvd.size()
    for dtype, dims in cases():
        one = numbers(dims, dtype)
        assert torch.equal(hvd.allreduce(one, op=hvd.Sum), one * size)
        assert torch.equal(hvd.allreduce(one, average=False), one * size)
        assert torch.equal(hvd.allreduce(one), one)
        shifted = one + hvd.rank()
        assert torch.equal(hvd.allreduce(shifted, op=hvd.Min), one)
        assert torch.equal(hvd.allreduce(shifted, op=hvd.Max), one + size - 1)
        small = one.clamp(max=2)
        assert torch.equal(hvd.allreduce(small, op=hvd.Product), small**size)
        within = one.clone()
        assert hvd.allreduce_(within, op=hvd.Sum) is within
        assert torch.equal(within, one * size)
    scalar = hvd.allreduce(torch.tensor(2.0), op=hvd.Sum)
    assert scalar.shape == ()
    assert float(scalar) == 2 * size
    turned = numbers(2).t()
    assert torch.equal(hvd.allreduce(turned), turned)


def factors() -> None:
    size, factor = hvd.size(), 0.7
    for dtype, dims in cases():
        one = numbers(dims, dtype)
        exact = torch.float64 if dtype in WHOLE else torch.float32 if dtype.itemsize == 2 else dtype
        scaled = (one.to(exact) * factor).to(dtype)
        assert torch.equal(hvd.allreduce(one, op=hvd.Sum, prescale_factor=factor), scaled * size)
        after = ((one * size).to(exact) * factor).to(dtype)
        assert torch.equal(hvd.allreduce(one, op=hvd.Sum, postscale_factor=factor), after)


def handles() -> None:
    size = hvd.size()
    waiting = []
    was_waiting = False
    for dtype, dims in cases():
        one = numbers(dims, dtype)
        handle = hvd.allreduce_async(one, op=hvd.Sum)
        was_waiting |= not hvd.poll(handle)
        waiting.append((one, handle))
    assert was_waiting
    for one, handle in waiting:
        assert torch.equal(hvd.synchronize(handle), one * size)
        assert hvd.poll(handle)


def groups() -> None:
    size = hvd.size()
    for dtype, dims in cases():
        tensors = [numbers(dims, dtype, seed=seed) for seed in range(5)]
        for summed, one in zip(hvd.grouped_allreduce(tensors, op=hvd.Sum), tensors, strict=True):
            assert torch.equal(summed, one * size)
        within = [one.clone() for one in tensors]
        hvd.grouped_allreduce_(within, op=hvd.Sum)
        assert all(torch.equal(summed, one * size) for summed, one in zip(within, tensors, strict=True))
        for gathered in hvd.grouped_allgather(tensors):
            assert gathered.shape[0] == SIDE * size
    mixed = hvd.grouped_allreduce([numbers(1), numbers(2, torch.int64)], op=hvd.Sum)
    assert [each.dtype for each in mixed] == [torch.float32, torch.int64]


def sparse_reductions() -> None:
    """Sparse tensors of other places on each rank have the sum and mean of dense ones; several at a time."""
    dense = [numbers(2, dtype, rows=9, seed=hvd.rank()) * (numbers(2, dtype, rows=9, seed=9) > 5) for dtype in TRAINED]
    waiting = [
        (one, op, hvd.sparse_allreduce_async(one.to_sparse(), name=f"{op}.{number}", op=op))
        for number, one in enumerate(dense)
        for op in (hvd.Average, hvd.Sum)
    ]
    for one, op, result in waiting:
        assert result().is_sparse
        assert torch.allclose(result().to_dense(), hvd.allreduce(one, op=op))


def names_in_another_order() -> None:
    """Horovod finds tensors by their names, so ranks may ask for them in any order."""
    tensors = {f"tensor {number}": torch.full((3,), float(number)) for number in range(6)}
    order = sorted(tensors, reverse=bool(hvd.rank() % 2))
    waiting = {name: hvd.allreduce_async(tensors[name], name=name, op=hvd.Sum) for name in order}
    for name, handle in waiting.items():
        assert torch.equal(hvd.synchronize(handle), tensors[name] * hvd.size())


def gathers() -> None:
    rank, size = hvd.rank(), hvd.size()
    for dtype, dims in cases((*WHOLE, *FLOATS, torch.bool)):
        rows = [3, 0, 7, 4][:size]
        mine = torch.full((rows[rank], *[SIDE] * (dims - 1)), rank).to(dtype)
        gathered = hvd.allgather(mine)
        assert gathered.dtype == dtype
        parts = gathered.split(rows)  # type: ignore[no-untyped-call]
        assert all(torch.equal(part, torch.full_like(part, each)) for each, part in enumerate(parts))
        assert torch.equal(hvd.synchronize(hvd.allgather_async(mine)), gathered)


def broadcasts() -> None:
    rank, size = hvd.rank(), hvd.size()
    for (dtype, dims), root in itertools.product(cases((*WHOLE, *FLOATS, torch.bool)), range(size)):
        mine, wanted = ((numbers(dims) * 0 + each).to(dtype) for each in (rank, root))
        assert torch.equal(hvd.broadcast(mine, root), wanted)
        assert torch.equal(mine, (numbers(dims) * 0 + rank).to(dtype))
        assert hvd.broadcast_(mine, root) is mine
        assert torch.equal(mine, wanted)


def exchanges() -> None:
    rank, size = hvd.rank(), hvd.size()
    for dtype, dims in cases():
        sent = torch.cat([numbers(dims, dtype, rows=rank + 1) * 0 + to for to in range(size)])
        received, counts = hvd.alltoall(sent, torch.tensor([rank + 1] * size, dtype=torch.int32))
        assert counts.tolist() == list(range(1, size + 1))
        assert torch.equal(received, torch.full_like(received, rank))
        equal = hvd.alltoall(numbers(dims, dtype, rows=size))
        assert torch.equal(equal, numbers(dims, dtype, rows=size)[rank].expand_as(equal))
    nothing, counts = hvd.alltoall(torch.empty(0, 4), [0] * size)
    assert nothing.shape == (0, 4)
    assert counts.tolist() == [0] * size
    only_first = [2] * size if rank == 0 else [0] * size
    received, counts = hvd.alltoall(torch.ones(sum(only_first)), only_first)
    assert (received.shape[0], counts.tolist()) == (2, [2] + [0] * (size - 1))


def scatters() -> None:
    rank, size = hvd.rank(), hvd.size()
    for dtype, dims in cases():
        one = numbers(dims, dtype, rows=size * 4)
        own = one[rank * 4 : rank * 4 + 4]
        assert torch.equal(hvd.reducescatter(one, op=hvd.Sum), own * size)
        assert torch.equal(hvd.reducescatter(one), own)
        both = hvd.grouped_reducescatter([one, one], op=hvd.Sum)
        assert all(torch.equal(each, own * size) for each in both)
    uneven = hvd.synchronize(hvd.reducescatter_async(torch.arange(float(size + 1)), op=hvd.Sum))
    assert uneven.tolist() == ([0.0, size] if rank == 0 else [(rank + 1.0) * size])


def sent_by(splits: Tensor, rows: Tensor) -> Tensor:
    received: Tensor = hvd.alltoall(rows, splits)[0]
    return received


def gradients() -> None:
    rank, size = hvd.rank(), hvd.size()

    def gradient(function: Callable[[Tensor], Any], leaf: Tensor, upstream: Any) -> Tensor:
        leaf = leaf.clone().requires_grad_()
        results = function(leaf)
        results = results if isinstance(results, list) else [results]
        torch.autograd.backward(results, [upstream(each) for each in results])
        assert leaf.grad is not None
        return leaf.grad

    for dtype, dims in cases(TRAINED):
        one = numbers(dims, dtype)
        ones = torch.ones_like(one)
        assert torch.equal(gradient(lambda x: hvd.allreduce(x, op=hvd.Sum), one, torch.ones_like), ones * size)
        assert torch.equal(gradient(hvd.allreduce, one, torch.ones_like), ones)
        grouped = gradient(lambda x: hvd.grouped_allreduce([x, x], op=hvd.Sum), one, torch.ones_like)
        assert torch.equal(grouped, ones * 2 * size)
        mine = torch.ones(rank + 1, *[SIDE] * (dims - 1), dtype=dtype)
        labels = torch.repeat_interleave(torch.arange(size), torch.arange(size) + 1).to(dtype)
        upstream = labels.view(-1, *[1] * (dims - 1)).expand(len(labels), *mine.shape[1:]).clone()
        gathered = gradient(hvd.allgather, mine, lambda _, upstream=upstream: upstream)
        assert torch.equal(gathered, mine * rank)
        for root in range(size):
            sent = gradient(lambda x, root=root: hvd.broadcast(x, root), one, torch.ones_like)  # type: ignore[misc]
            assert torch.equal(sent, ones * (rank == root))
        rows = numbers(dims, dtype, rows=size * 4)
        scattered = gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum), rows, torch.ones_like)
        assert torch.equal(scattered, torch.ones_like(rows) * size)
        assert torch.equal(gradient(hvd.reducescatter, rows, torch.ones_like), torch.ones_like(rows))
        splits = torch.tensor([1] * (size - 1) + [2], dtype=torch.int32)
        rows = numbers(dims, dtype, rows=size + 2)  # the last row is sent to nobody
        exchanged = gradient(partial(sent_by, splits), rows, lambda out: torch.full_like(out, rank))
        to = torch.tensor([*range(size), size - 1, 0]).to(dtype)
        assert torch.equal(exchanged, to.view(-1, *[1] * (dims - 1)).expand_as(rows))
    with pytest.raises(RequestError, match="has no gradient"):
        gradient(lambda x: hvd.allreduce(x, op=hvd.Max), numbers(1), torch.ones_like)


def disagreements() -> None:
    """All ranks get the error, and go on afterwards."""
    odd = hvd.rank() % 2
    wrong: dict[str, Callable[[], Any]] = {
        "shapes": lambda: hvd.allreduce(torch.ones(3 + odd)),
        "dtypes": lambda: hvd.allreduce(torch.ones(3, dtype=torch.int32 if odd else torch.float32)),
        "op": lambda: hvd.allreduce(torch.ones(3), op=hvd.Sum if odd else hvd.Average, name="ops"),
        "kind": lambda: hvd.allreduce(torch.ones(3), name="x") if odd else hvd.allgather(torch.ones(3), name="x"),
        "after the first dimension": lambda: hvd.allgather(torch.ones(3, 3 + odd)),
        "root rank": lambda: hvd.broadcast(torch.ones(3), odd),
        "does not take part": lambda: hvd.broadcast(torch.ones(3), hvd.size()),
        "postscale_factor": lambda: hvd.allreduce(torch.ones(3), postscale_factor=1.0 + odd),
    }
    for said, call in wrong.items():
        with pytest.raises(RuntimeError, match=said):
            call()
    assert torch.equal(hvd.allreduce(torch.ones(2)), torch.ones(2))


def misuses() -> None:
    size = hvd.size()
    scalar = torch.tensor(1.0)
    calls: tuple[Callable[..., Any], ...] = (hvd.allgather, hvd.reducescatter)
    for call in calls:
        with pytest.raises(RuntimeError, match="without dimensions"):
            call(scalar)
    with pytest.raises(ValueError, match="must divide"):
        hvd.alltoall(torch.ones(size + 1))
    with pytest.raises(ValueError, match="add up to the rows"):
        hvd.alltoall(torch.ones(size - 1), torch.ones(size, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be int32"):
        hvd.alltoall(torch.ones(size), torch.ones(size))
    with pytest.raises(ValueError, match="leave out average"):
        hvd.allreduce(torch.ones(1), average=True, op=hvd.Sum)
    with pytest.raises(ValueError, match="known are"):
        hvd.allreduce(torch.ones(1), op="Mode")
    with pytest.raises(RuntimeError, match="use allreduce"):
        hvd.reducescatter(torch.ones(size), op=hvd.Adasum)
    if hvd.rank() == 0:
        first = hvd.allreduce_async(torch.ones(1), name="twice")  # the others ask for it after the barrier
        with pytest.raises(ValueError, match="has not ended"):
            hvd.allreduce_async(torch.ones(1), name="twice")
    with pytest.raises(ValueError, match="must be Average or Sum"):
        hvd.sparse_allreduce_async(torch.eye(2).to_sparse(), "sparse", hvd.Max)
    for wrong in ([0.5], "01"):
        with pytest.raises(ValueError, match="whole numbers"):
            hvd.ProcessSet(wrong)  # type: ignore[arg-type]
    hvd.barrier()
    if hvd.rank():
        first = hvd.allreduce_async(torch.ones(1), name="twice")
    assert float(hvd.synchronize(first)) == 1


def joins() -> None:
    rank, size = hvd.rank(), hvd.size()
    for dtype, dims in cases((torch.int32, torch.int64, *TRAINED)):
        for leaver in (0, 1):
            one, other = numbers(dims, dtype), numbers(dims, dtype, seed=1)
            if rank != leaver:
                waiting = [(each, hvd.allreduce_async(each, op=hvd.Sum)) for each in (one, other)]
                for each, handle in waiting:
                    assert torch.equal(hvd.synchronize(handle), each * (size - 1))
                averaged = hvd.allreduce(one.double())
                assert torch.allclose(averaged, one.double() * (size - 1) / size)
            last = hvd.join()
            assert last != leaver
            assert torch.equal(hvd.allreduce(one), one)  # names are counted alike again
    if rank:
        for call in (lambda: hvd.allgather(torch.ones(3)), lambda: hvd.broadcast(torch.ones(3), 1)):
            with pytest.raises(RuntimeError, match=r"after ranks \[0\] have joined"):
                call()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="with op Min is not possible"):
            hvd.allreduce(torch.ones(3), op=hvd.Min)
    hvd.join()


def sets() -> None:
    rank, size = hvd.rank(), hvd.size()
    even = hvd.add_process_set(range(0, size, 2))
    odd = hvd.ProcessSet(range(1, size, 2))
    assert hvd.add_process_set(odd) is odd
    mine, other = (odd, even) if rank % 2 else (even, odd)
    assert mine.included()
    assert not other.included()
    assert mine.rank() == rank // 2
    assert even.ranks == list(range(0, size, 2))
    assert hvd.get_process_set_ids_and_ranks()[even.process_set_id or 0] == list(range(0, size, 2))
    summed = hvd.allreduce(torch.tensor([float(rank)]), op=hvd.Sum, process_set=mine)
    assert float(summed) == sum(mine.ranks)
    gathered = hvd.allgather(torch.full((rank + 1,), rank), process_set=mine)
    assert gathered.tolist() == [each for each in mine.ranks for _ in range(each + 1)]
    root = mine.ranks[-1]
    assert float(hvd.broadcast(torch.tensor([float(rank)]), root, process_set=mine)) == root
    assert hvd.broadcast_object({"rank": rank}, root, process_set=mine) == {"rank": root}
    with pytest.raises(RequestError, match="is not in the process set"):
        hvd.allreduce(torch.ones(1), process_set=other)
    with pytest.raises(ValueError, match="already"):
        hvd.add_process_set(range(0, size, 2))
    with pytest.raises(RequestError, match="must be some of"):
        hvd.add_process_set([size])
    assert hvd.remove_process_set(even)
    assert not hvd.remove_process_set(even)
    assert not hvd.remove_process_set(hvd.global_process_set)
    with pytest.raises(RequestError, match="was not added"):
        even.size()


def adaptive_sums() -> None:
    """Orthogonal tensors are added, parallel ones averaged."""
    rank, size = hvd.rank(), hvd.size()
    alone = torch.zeros(size).scatter(0, torch.tensor([rank]), 1.0 + rank)
    assert torch.allclose(hvd.allreduce(alone, op=hvd.Adasum), torch.arange(1.0, size + 1))
    same = torch.tensor([1.0, 2.0])
    assert torch.allclose(hvd.allreduce(same, op=hvd.Adasum), same)
    assert torch.equal(hvd.allreduce(torch.zeros(2), op=hvd.Adasum), torch.zeros(2))


def compressed() -> None:
    one = torch.tensor([1.0, 1 / 3, 100.0])
    for dtype in FLOATS:
        sent, context = hvd.Compression.fp16.compress(one.to(dtype))
        assert sent.dtype == torch.float16
        assert hvd.Compression.fp16.decompress(sent, context).dtype == dtype
    averaged = hvd.allreduce(one, compression=hvd.Compression.fp16)
    assert averaged.dtype == torch.float32
    assert torch.equal(averaged, one.half().float())
    whole, _ = hvd.Compression.fp16.compress(torch.tensor([3]))
    assert whole.dtype == torch.int64


def objects() -> None:
    rank, size = hvd.rank(), hvd.size()
    wanted: dict[Any, Any] = {"text": "é", "list": [1, (2.5, None)], 3: torch.arange(4), "large": "x" * 5000}
    received = hvd.broadcast_object(wanted if rank == 0 else None)
    assert received["list"] == wanted["list"]
    assert torch.equal(received[3], wanted[3])
    assert received["large"] == wanted["large"]
    assert hvd.allgather_object({"rank": rank, "more": "x" * rank}) == [
        {"rank": each, "more": "x" * each} for each in range(size)
    ]


def normalized() -> None:
    rank, size = hvd.rank(), hvd.size()
    for shape in ((3, 4), (3, 4, 2), (2, 4, 3, 3)):
        whole = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        plain_input, part = whole.flatten(0, 1).requires_grad_(), whole[rank].clone().requires_grad_()
        kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
        plain: Any = kind(4).double()
        synced: Any = hvd.SyncBatchNorm(4).double()
        scale = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected, got = plain(plain_input), synced(part)
        assert torch.allclose(got, expected.view(whole.shape)[rank])
        assert torch.allclose(synced.running_mean, plain.running_mean)
        assert torch.allclose(synced.running_var, plain.running_var)
        (expected * scale.flatten(0, 1)).sum().backward()
        (got * scale[rank]).sum().backward()
        assert plain_input.grad is not None
        assert part.grad is not None
        assert torch.allclose(part.grad, plain_input.grad.view(whole.shape)[rank])
        assert torch.allclose(hvd.allreduce(synced.weight.grad, op=hvd.Sum), plain.weight.grad)
        synced.eval(), plain.eval()
        assert torch.allclose(synced(part), plain(part))


ALL = (
    *(ranks, reductions, factors, handles, groups, names_in_another_order, gathers, broadcasts, exchanges, scatters),
    *(sparse_reductions,),
    *(gradients, disagreements, misuses, joins, compressed, objects, normalized),
)


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_two_ranks(workers: Pools, function: Callable[[], None]) -> None:
    workers(2, started, function)


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_three_ranks(workers: Pools, function: Callable[[], None]) -> None:
    workers(3, started, function)


def test_process_sets(workers: Pools) -> None:
    workers(4, started, sets)


def test_adasum(workers: Pools) -> None:
    workers(4, started, adaptive_sums)
    with pytest.raises(RuntimeError, match="power of two"):
        workers(3, started, adaptive_sums)
