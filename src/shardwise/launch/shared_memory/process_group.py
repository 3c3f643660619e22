"""Process group of torch.distributed whose workers share memory: a backend in Python, see `Backend.register_backend`.

It is the only module here that depends on how torch calls a backend. torch calls the methods of a Python process group
directly, from Python and from C++ (DDP); `tests/multiprocess/test_shared_memory.py` notices when their names change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function
from torch.distributed import ProcessGroup, Work
from torch.futures import Future

from shardwise.launch import waiting
from shardwise.launch.shared_memory import collectives
from shardwise.launch.shared_memory.choice import EVENTS, SHM
from shardwise.launch.shared_memory.collectives import SlotOperation
from shardwise.launch.shared_memory.mailbox import Inbox, Outbox, Receiving, Sending
from shardwise.launch.shared_memory.neighbours import Neighbours
from shardwise.launch.shared_memory.order import Order, Queued
from shardwise.launch.shared_memory.reduction import Reduction
from shardwise.launch.shared_memory.slots import Slots

_Untyped: Any = ProcessGroup
"""Class of torch, of which mypy knows more forms of each method than torch calls on a group in Python."""


class SharedMemoryGroup(_Untyped):  # type: ignore[misc]
    """Process group whose workers share memory."""

    transport = SHM

    def __init__(self, neighbours: Neighbours, rank: int, count: int) -> None:
        super().__init__(rank, count)
        self._rank, self._count = rank, count
        self._neighbours = neighbours
        self._slots, self._order = Slots(neighbours), Order()
        self._outbox = Outbox(neighbours)
        self._inboxes = {other: Inbox(neighbours, other) for other in neighbours.others}
        self._exchanges = 0
        self._label, self._about = "", "undefined"

    # ---- identity; torch asks for it in C++ and in Python ----

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """Return the name of the backend."""
        return SHM

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Set the name by which torch finds the group."""
        self._label = name

    def getGroupName(self) -> str:  # noqa: N802
        """Return the name by which torch finds the group."""
        return self._label

    def setGroupDesc(self, text: str) -> None:  # noqa: N802
        """Set the description of the group."""
        self._about = text

    def getGroupDesc(self) -> str:  # noqa: N802
        """Return the description of the group."""
        return self._about

    @property
    def group_name(self) -> str:
        """Name by which torch finds the group."""
        return self._label

    @property
    def group_desc(self) -> str:
        """Description of the group."""
        return self._about

    def shutdown(self) -> None:
        """Leave the group: end its threads, and let nobody wait for this worker any more."""
        self._order.close()
        self._outbox.close()
        self._neighbours.leave()

    def abort(self) -> None:
        """Leave the group."""
        self.shutdown()

    # ---- collectives ----

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Reduce each tensor over all workers, in place."""
        call = _Call("all_reduce", tensors, opts)
        for tensor in tensors:
            call.add(self._reduced(call.output(tensor), _operator(opts)))
        return self._run(call)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Work:
        """Reduce each tensor over all workers, in place."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Work:
        """Reduce each tensor over all workers; the result is on the root, the others keep theirs."""
        call, root = _Call("reduce", tensors, opts), self._rank == opts.rootRank
        for tensor in tensors:
            flat = call.output(tensor) if root else tensor.detach().clone().reshape(-1)
            call.add(self._reduced(flat, opts.reduceOp))
        return self._run(call)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Work:
        """Copy each tensor of the root to all workers."""
        call = _Call("broadcast", tensors, opts)
        for tensor in tensors:
            call.add(self._told(_bytes(call.output(tensor)), opts.rootRank))
        return self._run(call)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Work:
        """Copy each input of all workers to each worker's list of outputs."""
        call = _Call("all_gather", [each for row in outputs for each in row], opts)
        for row, part in zip(outputs, inputs, strict=True):
            call.add(self._parts_gathered([_bytes(call.output(each)) for each in row], part))
        return self._run(call)

    allgather_coalesced = allgather

    def all_gather_single(self, output: Tensor, part: Tensor, opts: Any = None) -> Work:
        """Copy the input of all workers to each worker's output, one after another."""
        return self.all_gather_single_coalesced([output], [part], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Copy each input of all workers to each worker's output, one after another."""
        call = _Call("all_gather", outputs, opts)
        for output, part in zip(outputs, inputs, strict=True):
            call.add(self._parts_gathered(_cut(_bytes(call.output(output)), self._count), part))
        return self._run(call)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Work:
        """Reduce the inputs over all workers; each worker's output is the result of its rank."""
        call = _Call("reduce_scatter", outputs, opts)
        for output, row in zip(outputs, inputs, strict=True):
            call.add(self._scattered(call.output(output), [_flat(each) for each in row], opts))
        return self._run(call)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any = None) -> Work:
        """Reduce the inputs over all workers; each worker's output is the part of its rank."""
        return self.reduce_scatter_single_coalesced([output], [whole], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Work:
        """Reduce the inputs over all workers; each worker's outputs are the parts of its rank."""
        call = _Call("reduce_scatter", outputs, opts)
        for output, whole in zip(outputs, inputs, strict=True):
            call.add(self._scattered(call.output(output), _cut(_flat(whole), self._count), opts))
        return self._run(call)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def barrier(self, opts: Any = None) -> Work:
        """Wait until all workers have called this."""
        call = _Call("barrier", [], opts)
        call.add(self._joined())
        return self._run(call)

    def _parts_gathered(self, outputs: Sequence[Tensor], part: Tensor) -> SlotOperation:
        mine = _bytes(_flat(part))
        _check_sizes([len(output) for output in outputs], len(mine))
        return self._gathered(outputs, mine)

    def _scattered(self, output: Tensor, parts: Sequence[Tensor], opts: Any) -> SlotOperation:
        _check_sizes([len(part) for part in parts], len(output))
        return self._reduce_scattered(output, parts, _operator(opts))

    # ---- operations of flat tensors, of which a group over several hosts has others ----

    def _told(self, data: Tensor, root: int) -> SlotOperation:
        return collectives.broadcast(self._slots, data, root)

    def _joined(self) -> SlotOperation:
        return collectives.barrier(self._slots)

    def _reduced(self, flat: Tensor, asked: Any) -> SlotOperation:
        return collectives.all_reduce(self._slots, flat, Reduction(asked))

    def _reduce_scattered(self, output: Tensor, parts: Sequence[Tensor], asked: Any) -> SlotOperation:
        return collectives.reduce_scatter(self._slots, output, parts, Reduction(asked))

    def _gathered(self, outputs: Sequence[Tensor], part: Tensor) -> SlotOperation:
        return collectives.all_gather(self._slots, outputs, part)

    # ---- exchanges of pieces of any size, which are messages ----

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Work:
        """Send each input to the worker of its rank."""
        return self._exchange("all_to_all", dict(enumerate(inputs)), dict(enumerate(outputs)), opts)

    def all_to_all_single(
        self, output: Tensor, whole: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> Work:
        """Send each part of the input, along its first dimension, to the worker of its rank."""
        target, after = _contiguous(output)
        outputs = _rows(target, output_sizes, self._count)
        inputs = _rows(whole, input_sizes, self._count)
        return self._exchange("all_to_all", dict(enumerate(inputs)), dict(enumerate(outputs)), opts, after, [output])

    alltoall_base = all_to_all_single

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Work:
        """Send the input of all workers to the root."""
        received = dict(enumerate(outputs[0])) if self._rank == opts.rootRank else {}
        return self._exchange("gather", {opts.rootRank: inputs[0]}, received, opts)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Work:
        """Send each input of the root to the worker of its rank."""
        sent = dict(enumerate(inputs[0])) if self._rank == opts.rootRank else {}
        return self._exchange("scatter", sent, {opts.rootRank: outputs[0]}, opts)

    def _exchange(
        self,
        operation: str,
        sent: dict[int, Tensor],
        received: dict[int, Tensor],
        opts: Any,
        after: Callable[[], None] | None = None,
        result: Sequence[Tensor] | None = None,
    ) -> Work:
        """Send and receive a message for each rank; tags below zero are those of exchanges, in their order."""
        self._exchanges += 1
        works = [self._sent(tensor, rank, -self._exchanges) for rank, tensor in sent.items() if rank != self._rank]
        works += [
            self._asked(tensor, rank, -self._exchanges) for rank, tensor in received.items() if rank != self._rank
        ]
        if self._rank in sent and self._rank in received:
            received[self._rank].data.copy_(sent[self._rank].data)
        work = _ExchangeWork(operation, works, after, list(received.values()) if result is None else result)
        if opts is not None and not getattr(opts, "asyncOp", True):
            work.wait()
        return work

    # ---- messages ----

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> Work:
        """Send a tensor to another worker."""
        return self._sent(tensors[0], rank, tag)

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> Work:
        """Receive a tensor from another worker."""
        return self._asked(tensors[0], rank, tag)

    def _sent(self, tensor: Tensor, rank: int, tag: int) -> _MessageWork:
        with _event("send"):
            return _SentWork(self._outbox, self._outbox.send(_bytes(_flat(tensor)), rank, tag), tensor)

    def _asked(self, tensor: Tensor, rank: int, tag: int) -> _MessageWork:
        target, after = _contiguous(tensor)
        inbox = self._inboxes[rank]
        return _ReceivedWork(inbox, inbox.ask(_bytes(target.view(-1)), tag), tensor, after)

    # ---- running ----

    def _run(self, call: _Call) -> Work:
        if not call.later:
            begin = time.perf_counter()
            with _event(call.name):
                self._order.now(call)
            waiting.add(begin)
            return _DoneWork(call.tensors)
        event = _begun(call.name)
        work = _CalledWork(self._order, self._order.later(call), call.tensors)
        if event is not None:
            work.end_with(event)
        return work


class _Call:
    """Operations that one call of a process group asks for, and what follows them: an `SlotOperation` itself."""

    def __init__(self, name: str, tensors: Sequence[Tensor], opts: Any) -> None:
        self.name, self.tensors = name, list(tensors)
        self.later = bool(getattr(opts, "asyncOp", True))
        self._operations: list[SlotOperation] = []
        self._after: list[Callable[[], None]] = []

    def add(self, operation: SlotOperation) -> None:
        """Add an operation."""
        self._operations.append(operation)

    def output(self, tensor: Tensor) -> Tensor:
        """Return a flat tensor that is written instead of one: the same memory, or copied to it afterwards."""
        target, after = _contiguous(tensor)
        if after is not None:
            self._after.append(after)
        return target.view(-1)

    def start(self) -> bool:
        """Fill slots as far as that does not wait."""
        return all(operation.start() for operation in self._operations)

    def finish(self) -> None:
        """Run the operations, and what follows them."""
        for operation in self._operations:
            operation.finish()
        for each in self._after:
            each()


class _DoneWork(Work):
    """Work that is over."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def is_success(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def result(self) -> list[Tensor]:
        """Return the tensors of the operation."""
        return self._tensors

    def get_future(self) -> Future[list[Tensor]]:
        """Return a future that is over."""
        future: Future[list[Tensor]] = Future()
        future.set_result(self._tensors)
        return future


class _CalledWork(_DoneWork):
    """Collective that was called to be waited for later."""

    def __init__(self, order: Order, pending: Queued, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._order, self._pending = order, pending
        self._seen: Future[Any] | None = None

    def end_with(self, event: Any) -> None:
        """Let an event of the profiler end with it, in the group's thread.

        Within one thread, what computes beside it would count as a part of the event.
        """
        self._seen = event._call_end_callbacks_on_future(self.get_future())

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it has run. Raises what it failed with."""
        begin = time.perf_counter()
        try:
            if self._seen is not None:
                self._seen.wait()
            self._order.wait(self._pending)
        finally:
            waiting.add(begin)
        return True

    def synchronize(self) -> None:
        """Wait until it has run."""
        self.wait()

    def is_completed(self) -> bool:
        """Return whether it has run; from now on it runs by itself."""
        if not self._pending.done:
            self._order.hurry()
        return self._pending.done

    def is_success(self) -> bool:
        """Return whether it has run without an error."""
        return self._pending.done and self._pending.error is None

    def get_future(self) -> Future[list[Tensor]]:
        """Return a future of its tensors; from now on it runs by itself."""
        ran: Future[None] = Future()
        self._pending.tell(lambda: ran.set_result(None))
        if not self._pending.done:
            self._order.hurry()
        return ran.then(self._outcome)

    def _outcome(self, ran: Future[None]) -> list[Tensor]:
        """Return the tensors, or raise what it failed with: C++ learns of the error of a callback only."""
        if self._pending.error is not None:
            raise self._pending.error
        return self._tensors


class _MessageWork(_DoneWork):
    """Message that is sent or received."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__([tensor])

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until its memory may be used again. Raises RuntimeError if the other worker has ended."""
        begin = time.perf_counter()
        try:
            self._complete()
        finally:
            waiting.add(begin)
        return True

    def synchronize(self) -> None:
        """Wait until its memory may be used again."""
        self.wait()

    def is_success(self) -> bool:
        """Return whether its memory may be used again."""
        return self.is_completed()

    def get_future(self) -> Future[list[Tensor]]:
        """Wait for it, and return a future that is over."""
        self.wait()
        return super().get_future()

    def _complete(self) -> None:
        raise NotImplementedError


class _SentWork(_MessageWork):
    def __init__(self, outbox: Outbox, sending: Sending, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._outbox, self._sending = outbox, sending

    def is_completed(self) -> bool:
        return self._sending.done

    def _complete(self) -> None:
        self._outbox.wait(self._sending)


class _ReceivedWork(_MessageWork):
    def __init__(self, inbox: Inbox, receiving: Receiving, tensor: Tensor, after: Callable[[], None] | None) -> None:
        super().__init__(tensor)
        self._inbox, self._receiving, self._after = inbox, receiving, after

    def is_completed(self) -> bool:
        return self._inbox.poll(self._receiving)

    def _complete(self) -> None:
        with _event("recv"):
            self._inbox.wait(self._receiving)
            if self._after is not None:
                self._after()


class _ExchangeWork(_MessageWork):
    """Messages that together are one operation."""

    def __init__(
        self, name: str, works: Sequence[_MessageWork], after: Callable[[], None] | None, result: Sequence[Tensor]
    ) -> None:
        super().__init__(torch.empty(0))
        self._name, self._works, self._after, self._tensors = name, works, after, list(result)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def _complete(self) -> None:
        with _event(self._name):
            for work in self._works:
                work._complete()
            if self._after is not None:
                self._after()


def _event(name: str) -> AbstractContextManager[Any]:
    return record_function(EVENTS + name) if _profiler_enabled() else nullcontext()


def _begun(name: str) -> Any:
    """Begin an event of the profiler that ends in another thread. Returns None if no profiler runs."""
    if not _profiler_enabled():
        return None
    event = record_function(EVENTS + name)
    event.__enter__()  # type: ignore[no-untyped-call]
    return event


def _contiguous(tensor: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
    """Return contiguous memory to write instead of a tensor, and a function that copies it there if that is needed.

    It has no version: like other backends, this one writes to memory that autograd does not watch.
    """
    data = tensor.data
    if data.is_contiguous():
        return data, None
    copied = data.contiguous()

    def put_back() -> None:
        data.copy_(copied)

    return copied, put_back


def _operator(opts: Any) -> Any:
    """Return the operation of a reduction; a sum if there are no options."""
    return dist.ReduceOp.SUM if opts is None else opts.reduceOp


def _flat(tensor: Tensor) -> Tensor:
    return tensor.data.contiguous().view(-1)


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _cut(flat: Tensor, count: int) -> list[Tensor]:
    """Return equal parts of a flat tensor. Raises ValueError if there are none."""
    size, rest = divmod(len(flat), count)
    if rest:
        raise ValueError(f"a tensor of {len(flat)} elements cannot be cut into {count} equal parts")
    return [flat[rank * size : (rank + 1) * size] for rank in range(count)]


def _rows(tensor: Tensor, sizes: Sequence[int], count: int) -> list[Tensor]:
    """Return parts of a tensor along its first dimension: of `sizes`, or `count` equal ones if there are none."""
    lengths = list(sizes) or [len(tensor) // count] * count
    if sum(lengths) != len(tensor):
        raise ValueError(f"{len(tensor)} rows cannot be cut into {count} parts of {lengths[0]}")
    return list(tensor.split(lengths))  # type: ignore[no-untyped-call]


def _check_sizes(sizes: Sequence[int], expected: int) -> None:
    for size in sizes:
        if size != expected:
            raise ValueError(f"all parts of a collective must be equal, got {size} and {expected}")
