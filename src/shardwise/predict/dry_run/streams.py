"""Order of a step's events on the streams of a device: which events each kernel and each collective waits for.

A program says this by the calls that it makes on a GPU, and the record is made from the same calls:

    kernel            follows the kernels of its own stream
    collective        runs on a stream of its process group, after all that its stream has been given so far
    work.wait()       what its stream is given from then on follows the collective
    wait_stream, wait_event, record_event     order streams, as `fully_shard` does with its four

torch gives `fully_shard` streams without effect on a CPU. `recorded_streams` gives it streams that note these calls.
DDP waits for its buckets in C++, where no call is seen: whoever reads a bucket then waits for its all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._C._distributed_c10d import FakeWork, Work

COMPUTE = 0
"""Number of the stream on which a program computes."""


@dataclass(slots=True)
class Streams:
    """Streams of a device, and the events that the next kernel of each has to wait for.

    Attributes:
        current: number of the stream that is given kernels and collectives.
    """

    current: int = COMPUTE
    _last: dict[int, int] = field(default_factory=dict)
    _awaited: dict[int, set[int]] = field(default_factory=dict)
    _works: dict[int, tuple[Any, int]] = field(default_factory=dict)
    _results: dict[int, int] = field(default_factory=dict)
    _followed: dict[int, set[int]] = field(default_factory=dict)
    _count: int = 1

    def new(self) -> int:
        """Return the number of a new stream."""
        self._count += 1
        return self._count - 1

    # ---- events -----------------------------------------------------------------------------------------------------

    def kernel(self, number: int, storages: Iterable[int]) -> tuple[int, ...]:
        """Give the current stream event `number`, a kernel, and return the events that it waits for.

        Args:
            number: index of the event.
            storages: numbers of the storages that it reads or writes.
        """
        if self._results:
            self.wait({self._results[storage] for storage in storages if storage in self._results})
        self._last[self.current] = number
        return tuple(sorted(self._awaited.pop(self.current, ())))

    def collective(self, number: int, work: Any, storages: Iterable[int]) -> tuple[int, ...]:
        """Issue event `number`, a collective, from the current stream, and return the events that it waits for.

        Args:
            number: index of the event.
            work: handle by which the program may wait for it; None if there is none.
            storages: numbers of the storages of its results.
        """
        if work is not None:
            self._works[id(work)] = work, number  # kept alive, so that the program gets the same handle
        self._results.update(dict.fromkeys(storages, number))
        self._followed[number] = self.position(self.current)
        return tuple(sorted(self._followed[number]))

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def position(self, stream: int) -> set[int]:
        """Return the events after which a stream has done all that it has been given so far."""
        last = {self._last[stream]} if stream in self._last else set()
        return last | self._awaited.get(stream, set())

    def wait(self, numbers: Iterable[int], stream: int | None = None) -> None:
        """Make a stream, by default the current one, wait for events."""
        awaited = set(numbers)
        if awaited:
            before = self._awaited.setdefault(self.current if stream is None else stream, set())
            before.update(awaited)
            before.difference_update(*(self._followed.get(number, ()) for number in awaited))
            self._results = {key: number for key, number in self._results.items() if number not in awaited}

    def wait_for_work(self, work: Any) -> None:
        """Make the current stream wait for a collective by its handle; unknown handles are ignored."""
        _, number = self._works.pop(id(work), (None, None))
        if number is not None:
            self.wait([number])

    def wait_for_results(self, storages: Iterable[int]) -> None:
        """Make the current stream wait for the collectives whose results lie in these storages."""
        self.wait({self._results[storage] for storage in storages if storage in self._results})

    @contextmanager
    def noting_waits(self) -> Iterator[None]:
        """Note, while the context is open, for which collectives the program waits."""

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
                self.wait_for_work(work)
                return original(work, *args, **kwargs)

            return wait

        with (
            mock.patch.object(Work, "wait", noting(Work.wait)),
            mock.patch.object(FakeWork, "wait", noting(FakeWork.wait)),
        ):
            yield
        self._works.clear()
        self._results.clear()


# ---- the streams of `fully_shard` -----------------------------------------------------------------------------------


class _Event:
    """Stand-in for `torch.cuda.Event`."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.numbers: set[int] = set()

    def record(self, stream: _StandInStream | None = None) -> None:
        self.numbers = self._streams.position(self._streams.current if stream is None else stream.number)


class _StandInStream:
    """Stand-in for `torch.cuda.Stream`."""

    def __init__(self, streams: Streams, number: int) -> None:
        self._streams = streams
        self.number = number

    def wait_event(self, event: _Event) -> None:
        self._streams.wait(event.numbers, self.number)

    def wait_stream(self, other: _StandInStream) -> None:
        self._streams.wait(self._streams.position(other.number), self.number)

    def record_event(self) -> _Event:
        event = _Event(self._streams)
        event.record(self)
        return event


class _Device:
    """Stand-in for `torch.cuda`, as far as `fully_shard` uses it."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._known = {COMPUTE: _StandInStream(streams, COMPUTE)}

    def Stream(self, priority: int = 0) -> _StandInStream:  # noqa: N802 (torch's name)
        number = self._streams.new()
        return self._known.setdefault(number, _StandInStream(self._streams, number))

    def Event(self) -> _Event:  # noqa: N802 (torch's name)
        return _Event(self._streams)

    def current_stream(self) -> _StandInStream:
        return self._known[self._streams.current]

    @contextmanager
    def stream(self, stream: _StandInStream) -> Iterator[None]:
        before, self._streams.current = self._streams.current, stream.number
        try:
            yield
        finally:
            self._streams.current = before


@contextmanager
def recorded_streams(streams: Streams) -> Iterator[None]:
    """Make models that `fully_shard` splits inside the context order their work on `streams`, as on a GPU."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group, _fsdp_state

    device = _Device(streams)
    with ExitStack() as stack:
        for module in (_fsdp_collectives, _fsdp_param_group, _fsdp_state):
            stack.enter_context(mock.patch.object(module, "_get_device_handle", return_value=device))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", device.current_stream))
        yield
