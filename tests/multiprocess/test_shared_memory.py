"""Collectives and messages through shared memory equal those of gloo; what fails there fails here, and never hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import Pools, use_backend
from torch import Tensor, nn

from shardwise.host_layers import LEAST_BYTES
from shardwise.launch.shared_memory import neighbours
from shardwise.launch.shared_memory.backend import used
from shardwise.launch.shared_memory.layered_group import PIECE_BYTES as LAYERED_PIECE_BYTES
from shardwise.launch.shared_memory.mailbox import PIECE_BYTES
from shardwise.launch.shared_memory.process_group import SharedMemoryGroup
from shardwise.launch.shared_memory.registration import register
from shardwise.launch.shared_memory.segment import ARENA_BYTES, ENTRIES, SLOT_BYTES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int32, torch.int64, torch.uint8, torch.bool)
SIZES = (0, 1, 1000, SLOT_BYTES // 4 + 3)


def on_hosts(host: Callable[[int], int], function: Callable[[], Any]) -> Any:
    """Run a function whose process groups take workers for those of several hosts."""
    name = [f"host {host(dist.get_rank())}"]
    with mock.patch.object(neighbours, "_host", return_value=name):
        use_backend(register())
        return function()


@pytest.fixture(params=["neighbours", "others"])
def two_hosts(workers: Pools, request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], list[Any]]:
    """Four workers on two hosts of two: ranks 0 and 1 on one host, or 0 and 2."""
    host = {"neighbours": lambda rank: rank // 2, "others": lambda rank: rank % 2}[request.param]
    return lambda function: workers(4, on_hosts, host, function)


def values(size: int, dtype: torch.dtype, rank: int, salt: int = 0) -> Tensor:
    """Small numbers, whose sums and products are exact in every dtype."""
    found = (torch.arange(size) * 7 + rank * 3 + salt) % 3
    return found.to(dtype) if dtype is not torch.bool else found > 1


def shared() -> SharedMemoryGroup:
    group = dist.group.WORLD
    assert isinstance(group, SharedMemoryGroup)
    return group


def send(x: Tensor, rank: int, tag: int) -> None:
    """Send without waiting for the receiver."""
    work = dist.isend(x, rank, tag=tag)
    assert work is not None
    work.wait()


def equal_to_gloo() -> None:
    gloo = dist.new_group(backend="gloo")
    for dtype in DTYPES:
        for size in SIZES:
            for run in cases(size, dtype):
                for mine, theirs in zip(run(shared(), size, dtype), run(gloo, size, dtype), strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


Case = Callable[[Any, int, torch.dtype], list[Tensor]]
"""Function of (group, elements, dtype) that communicates, and returns what this rank has then."""


def reduced(name: str) -> Case:
    def run(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
        x = values(size, dtype, dist.get_rank())
        dist.all_reduce(x, getattr(dist.ReduceOp, name), group=group)
        return [x]

    return run


def scattered(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
    parts = [values(size, dtype, dist.get_rank(), salt) for salt in range(dist.get_world_size())]
    output, single = torch.zeros(2, size, dtype=dtype)
    dist.reduce_scatter(output, parts, group=group)
    dist.reduce_scatter_single(single, torch.cat(parts), group=group)
    return [output, single]


def gathered(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
    rank, count = dist.get_rank(), dist.get_world_size()
    parts, single = list(torch.zeros(count, size, dtype=dtype)), torch.zeros(size * count, dtype=dtype)
    dist.all_gather(parts, values(size, dtype, rank), group=group)
    dist.all_gather_single(single, values(size, dtype, rank, 1), group=group)
    return [*parts, single]


def told(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
    x = values(size, dtype, dist.get_rank())
    dist.broadcast(x, dist.get_world_size() - 1, group=group)
    return [x]


def exchanged(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
    rank = dist.get_rank()
    sizes = [size + other + rank for other in range(dist.get_world_size())]
    inputs = [values(length, dtype, rank, salt) for salt, length in enumerate(sizes)]
    output = torch.zeros(sum(sizes), dtype=dtype)
    dist.all_to_all_single(output, torch.cat(inputs), sizes, sizes, group=group)
    return [output]


def one_way(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
    rank, count = dist.get_rank(), dist.get_world_size()
    x, roots, mine = (
        values(size, dtype, rank),
        list(torch.zeros(count, size, dtype=dtype)),
        torch.zeros(size, dtype=dtype),
    )
    dist.gather(x, roots if rank == 0 else None, 0, group=group)
    dist.scatter(mine, [values(size, dtype, rank, salt) for salt in range(count)] if rank == 1 else None, 1, group)
    return [mine, *(roots if rank == 0 else [])]


def passed_on(group: Any, size: int, dtype: torch.dtype) -> list[Tensor]:
    rank, count = dist.get_rank(), dist.get_world_size()
    x, came = values(size, dtype, rank), torch.zeros(size, dtype=dtype)
    operations = [
        dist.P2POp(dist.isend, x, (rank + 1) % count, group),
        dist.P2POp(dist.irecv, came, (rank - 1) % count, group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [came]


def cases(size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield what both kinds of groups can do."""
    yield from (gathered, told, passed_on)
    if size:
        yield from (exchanged, one_way)
    if dtype is torch.bool:
        return
    yield scattered
    yield from map(reduced, ("SUM", "PRODUCT", "MIN", "MAX"))
    yield from map(reduced, ("AVG",) if dtype in FLOATS else ("BAND", "BOR", "BXOR"))


@pytest.mark.parametrize("count", [2, 4])
def test_every_operation_equals_gloo(workers: Pools, count: int) -> None:
    workers(count, equal_to_gloo)


def random_sums() -> list[Tensor]:
    """Sums of numbers that round, large and small, in both dtypes: as all ranks have them."""
    torch.manual_seed(dist.get_rank())
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (5, 1000, SLOT_BYTES):
            x = torch.randn(size).to(dtype)
            exact = x.double()
            dist.all_reduce(x)
            dist.all_reduce(exact)
            torch.testing.assert_close(x, exact.to(dtype))
            found.append(x)
    return found


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_ranks_have_the_same_bits(workers: Pools, count: int) -> None:
    first, *others = workers(count, random_sums)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine, theirs)


def strided() -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    whole = torch.full((6, 8), float(rank))
    dist.all_reduce(whole[:, ::2])
    assert whole[:, ::2].eq(sum(range(count))).all()
    assert whole[:, 1::2].eq(rank).all()
    came = torch.zeros(8, 6).t()
    if rank == 0:
        dist.send(torch.arange(48.0).view(8, 6).t(), 1)
    elif rank == 1:
        dist.recv(came, 0)
        assert torch.equal(came, torch.arange(48.0).view(8, 6).t())
    image = torch.full((2, 3, 4, 4), float(rank)).to(memory_format=torch.channels_last)
    work: Any = dist.all_reduce(image, async_op=True)
    work.wait()
    assert image.eq(sum(range(count))).all()


def test_tensors_that_are_not_contiguous(workers: Pools) -> None:
    workers(2, strided)


def overtaking() -> None:
    """Many collectives in flight, small and large, of two groups, waited for in another order; and messages beside."""
    rank, count = dist.get_rank(), dist.get_world_size()
    other = dist.new_group()
    sizes = (3, 2 * SLOT_BYTES, 1, SLOT_BYTES // 4, 9 * SLOT_BYTES // 4, 17) * 3
    tensors = [torch.full((size,), float(rank + index)) for index, size in enumerate(sizes)]
    works: list[Any] = [
        dist.all_reduce(x, group=(None, other)[index % 2], async_op=True) for index, x in enumerate(tensors)
    ]
    came = torch.zeros(1)
    asked: Any = dist.irecv(came, (rank - 1) % count, tag=7)
    send(torch.tensor([float(rank)]), (rank + 1) % count, 7)
    for work in works[::-1] if rank else works[::2] + works[1::2]:
        work.wait()
    asked.wait()
    assert came.item() == (rank - 1) % count
    for index, x in enumerate(tensors):
        assert x.eq(sum(range(count)) + count * index).all()


@pytest.mark.parametrize("count", [2, 4])
def test_collectives_may_be_waited_for_in_any_order(workers: Pools, count: int) -> None:
    workers(count, overtaking)


def crossing() -> None:
    """One rank waits for a large collective of a group that the other has called, and waits in another one."""
    rank, other = dist.get_rank(), dist.new_group()
    large, small = torch.ones(4 * SLOT_BYTES), torch.ones(1)
    work: Any = dist.all_reduce(large, group=other, async_op=True)
    if rank == 0:
        work.wait()
    dist.all_reduce(small)
    work.wait()
    assert large.eq(2).all()
    assert small.item() == 2


def test_a_collective_goes_on_while_its_caller_waits_in_another_group(workers: Pools) -> None:
    workers(2, crossing)


def tagged() -> None:
    rank = dist.get_rank()
    sizes = {5: 3, 1: PIECE_BYTES, 9: 0, 2: 100, 4: PIECE_BYTES // 2 + 1}
    if rank == 0:
        for tag, size in sizes.items():
            send(torch.full((size,), float(tag)), 1, tag)
        for number in range(ENTRIES + 10):
            dist.isend(torch.tensor([number]), 1, tag=3)
    else:
        for tag in sorted(sizes, reverse=True):
            came = torch.zeros(sizes[tag])
            dist.recv(came, 0, tag=tag)
            assert came.eq(tag).all()
        works = [(torch.zeros(1, dtype=torch.long), number) for number in range(ENTRIES + 10)]
        asked: list[Any] = [dist.irecv(came, 0, tag=3) for came, _ in works]
        for work, (came, number) in zip(reversed(asked), reversed(works), strict=True):
            work.wait()
            assert came.item() == number
    dist.barrier()


def test_messages_are_found_by_their_tags(workers: Pools) -> None:
    workers(2, tagged)


def crowded() -> None:
    """More bytes under way than an arena holds, both ways at once, before anybody receives."""
    rank = dist.get_rank()
    pieces = [torch.full((ARENA_BYTES // 8,), float(rank + number)) for number in range(4)]
    sends: list[Any] = [dist.isend(piece, 1 - rank, tag=number) for number, piece in enumerate(pieces)]
    dist.barrier()
    for number in range(4):
        came = torch.zeros(ARENA_BYTES // 8)
        dist.recv(came, 1 - rank, tag=number)
        assert came.eq(1 - rank + number).all()
    for send in sends:
        send.wait()


def test_messages_without_room_are_sent_later(workers: Pools) -> None:
    workers(2, crowded)


def wrong_sizes() -> None:
    if dist.get_rank() == 0:
        dist.send(torch.zeros(3), 1)
    else:
        with pytest.raises(RuntimeError, match="a message of 12 bytes came where 8 are expected"):
            dist.recv(torch.zeros(2), 0)
    with pytest.raises(ValueError, match="must be equal"):
        dist.reduce_scatter(torch.zeros(2), [torch.zeros(3)] * 2)
    with pytest.raises(ValueError, match="cannot be cut into 2 equal parts"):
        dist.reduce_scatter_single(torch.zeros(2), torch.zeros(5))
    dist.barrier()


def test_wrong_sizes_are_told(workers: Pools) -> None:
    workers(2, wrong_sizes)


def left_alone() -> float:
    """Seconds until a worker notices that the other one has left the group."""
    group = dist.new_group()
    if dist.get_rank() == 1:
        dist.destroy_process_group(group)
        return 0.0
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Connection closed: worker 1 of the group"):
        dist.all_reduce(torch.ones(3), group=group)
    return time.monotonic() - start


def test_a_worker_that_leaves_is_noticed(workers: Pools) -> None:
    assert max(workers(2, left_alone)) < 5


def replicated() -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 8))
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02)
    torch.manual_seed(dist.get_rank())
    parallel(torch.randn(4, 64)).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]


def test_ddp_waits_for_futures(workers: Pools) -> None:
    first, second = workers(2, replicated)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.abs().sum() > 0
        assert torch.equal(mine, theirs)


def asking_again(future: Any) -> Tensor:
    """Sum the result of a collective over the workers once more, and wait for it."""
    x = future.value()[0]
    dist.all_reduce(x)
    found: Tensor = dist.all_reduce(x, async_op=True).get_future().wait()[0]
    return found


def asked_again() -> float:
    x = torch.ones(2**20)
    return float(dist.all_reduce(x, async_op=True).get_future().then(asking_again).wait()[0])


def test_a_callback_may_wait_for_a_further_collective(workers: Pools) -> None:
    """The hook of torch's PowerSGD does."""
    assert workers(2, asked_again) == [8.0, 8.0]


def replicated_alone() -> None:
    """One worker leaves the group while the other waits for its gradients in C++."""
    group = dist.new_group()
    model = nn.parallel.DistributedDataParallel(nn.Linear(64, 300), process_group=group)
    loss = model(torch.randn(4, 64)).square().sum()
    if dist.get_rank() == 1:
        dist.destroy_process_group(group)
    else:
        with pytest.raises(RuntimeError, match="Connection closed: worker 1 of the group"):
            loss.backward()


def test_ddp_is_told_of_a_worker_that_leaves(workers: Pools) -> None:
    workers(2, replicated_alone)


Hosts = Callable[[Callable[[], Any]], list[Any]]


def layered() -> None:
    assert used() == "shm+gloo"
    equal_to_gloo()


def test_every_operation_over_hosts_equals_gloo(two_hosts: Hosts) -> None:
    two_hosts(layered)


def layered_numbers() -> list[Tensor]:
    """Results of random numbers in several pieces that no number of workers divides: as all ranks have them.

    They equal those of gloo, which runs over all workers at once, in float64.
    """
    torch.manual_seed(dist.get_rank())
    gloo, count, found = dist.new_group(backend="gloo"), dist.get_world_size(), []
    for size in (LEAST_BYTES // 8, 3 * LAYERED_PIECE_BYTES // 8 + 5):
        whole = torch.randn(size * count, dtype=torch.float64)
        for operation in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            sums, parts = [], []
            for group in (None, gloo):
                x, part = whole[: size + 1].clone(), torch.empty(size, dtype=torch.float64)
                dist.all_reduce(x, operation, group=group)
                dist.reduce_scatter_single(part, whole, operation, group=group)
                sums.append(x)
                parts.append(part)
            torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(*parts, rtol=1e-12, atol=1e-12)
            everything = torch.empty_like(whole)
            dist.all_gather_single(everything, parts[0])
            found += [sums[0], everything]
    return found


def test_layers_sum_as_all_workers_at_once_do(two_hosts: Hosts) -> None:
    first, *others = two_hosts(layered_numbers)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine, theirs)


def test_layered_collectives_may_be_waited_for_in_any_order(two_hosts: Hosts) -> None:
    two_hosts(overtaking)


def test_ddp_over_hosts(two_hosts: Hosts) -> None:
    first, *others = two_hosts(replicated)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine, theirs)


def left_by_one() -> None:
    """One worker leaves the group: all others are told, also on the other host."""
    group = dist.new_group()
    if dist.get_rank() == 1:
        dist.destroy_process_group(group)
        return
    try:
        with pytest.raises(RuntimeError, match=r"Connection|closed|reset"):
            dist.all_reduce(torch.ones(LEAST_BYTES), group=group)
    finally:
        dist.destroy_process_group(group)


def test_a_worker_that_leaves_is_noticed_on_all_hosts(two_hosts: Hosts) -> None:
    start = time.monotonic()
    two_hosts(left_by_one)
    assert time.monotonic() - start < 30


def apart() -> str | None:
    dist.barrier()  # nobody leaves before all have connected
    return used()


def test_hosts_of_different_sizes_use_gloo(workers: Pools) -> None:
    assert workers(3, on_hosts, partial(min, 1), apart) == ["gloo"] * 3
    assert workers(2, on_hosts, int, apart) == ["gloo"] * 2
