"""Recorder of one step of a program on real or fake workers: kernels, collectives, and memory at its peak.

    program.step_share(share)                         # warm up: buckets are built, optimizer states allocated
    with StepRecorder() as recorder, recorder.following(program):
        program.step_share(share)
    record = recorder.record()
    record.kernels        # tuple[Kernel], in order; `Kernel.when` says forward, backward, recompute or optimizer
    record.collectives    # tuple[Collective], in order
    record.events         # both in one order, each with its mark, stream and waits: Event("0F3", Kernel | Collective)
    record.memory         # prediction.Memory at the peak: the bytes of all tensors that are alive

A mark is spelled like an action of the pipeline: stage index, kind (F forward, B backward, or its halves I for inputs
and W for weights) and microbatch, for example `0F3`. Without a pipeline there is stage 0 alone. Events that belong to
no microbatch have the mark `reduce` (all-reduces of gradients after the last backward pass), `update` (the optimizer,
and broadcasts of updated parameters) or none (losses, norms, clipping). `StepRecorder.mark` is a context manager for
marks of one's own.

The recorder is a dispatch mode: it sees every operation that reaches torch's dispatcher, from Python, from autograd
(whose backward pass runs in the calling thread on the CPU) and from C++ (DDP's reducer). Operations on a subclass of
tensors, `DTensor`, are seen as the local operations that they run on this worker. Workspace inside of kernels is not
seen.

If `offloaded` is set, sharded parameters, their gradients and their optimizer states lie on the host and take no memory
of the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.collective import Collective
from shardwise.parallel.engine import Engine
from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.program import Program
from shardwise.parallel.state.dtensor_rows import is_split, local
from shardwise.predict.dry_run.c10d_ops import Axes, collective_of, is_collective, work_of
from shardwise.predict.dry_run.device_queries import asks_for_device
from shardwise.predict.dry_run.storages import Storages
from shardwise.predict.dry_run.streams import COMPUTE, Streams
from shardwise.predict.prediction import Memory
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.op_counter import kernel_of, tensors
from shardwise.splitting.schedule import Action

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


AVERAGE = "average"
"""Mark of what averages parameters after local steps."""


@contextmanager
def collector_off() -> Iterator[None]:
    """Turn Python's garbage collector off inside the context.

    A recorder that is opened in it looks for reference cycles only in what was made there, which takes a tenth of the
    time of a look at all objects.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Event:
    """A kernel or collective that a worker issued.

    Attributes:
        mark: part of the step; see the module's docstring.
        what: the kernel or collective.
        stream: number of the stream on which a kernel runs, or from which a collective is issued; see `streams`.
        after: indices of the earlier events that it waits for, besides the kernels before it on its stream.
    """

    mark: str
    what: Kernel | Collective
    stream: int = COMPUTE
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Record of one step on one worker.

    Attributes:
        events: kernels and collectives, in the order in which they were issued.
        memory: memory of all tensors at the peak, by category.
    """

    events: tuple[Event, ...]
    memory: Memory

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Return the kernels in the order in which they were issued."""
        return tuple(event.what for event in self.events if isinstance(event.what, Kernel))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Return the collectives in the order in which they were issued."""
        return tuple(event.what for event in self.events if isinstance(event.what, Collective))


class StepRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records a step; see the module's docstring. Open it inside of any `FakeTensorMode`.

    Args:
        offloaded: whether sharded parameters, their gradients and their optimizer states lie on the host.
        streams: streams of the device; None: of a device that has only one.
    """

    def __init__(self, *, offloaded: bool = False, streams: Streams | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._offloaded = offloaded
        self._streams = streams or Streams()
        self._events: list[Event] = []
        self._storages = Storages()
        self._axes = Axes(())
        self._base, self._mark, self._stretch = "", "", ("", "")
        self._off = collector_off()
        self._engine: Engine | None = None

    def __enter__(self) -> StepRecorder:
        # else reference cycles would be freed at an arbitrary moment of the step; all that was made while the collector
        # was off is in its youngest generation
        gc.collect(2 if gc.isenabled() else 0)
        self._off.__enter__()
        self._storages.open()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        self._storages.close()
        self._off.__exit__(*details)

    def record(self) -> StepRecord:
        """Return the record of all that was observed so far."""
        return StepRecord(tuple(self._events), self._storages.peak())

    # ---- the parts of a step ----------------------------------------------------------------------------------------

    @contextmanager
    def mark(self, mark: str | None = None, base: str | None = None) -> Iterator[None]:
        """Mark events while the context is open.

        Args:
            mark: their mark; None leaves it as it is.
            base: their phase: `forward`, `backward` or `optimizer`; None leaves it as it is.
        """
        before = self._mark, self._base
        self._mark = self._mark if mark is None else mark
        self._base = self._base if base is None else base
        try:
            yield
        finally:
            self._mark, self._base = before

    @contextmanager
    def following(self, program: Program) -> Iterator[None]:
        """Mark the parts of a program's steps while the context is open, and categorize the program's tensors."""
        self._axes, self._engine = Axes.of(program.mesh), program.engine
        self._mark_category((held.tensor for held in program.engine.held.values()), "parameters")
        self._mark_states(program)
        with _wrapped(self, program), self._streams.noting_waits():
            yield
        self._mark_states(program)

    def _mark_states(self, program: Program) -> None:
        """Categorize optimizer states and gradients, which may exist before a step or only after it."""
        states = [] if program.optimizer is None else list(program.optimizer.state.values())
        self._storages.mark(program.compression_state(), "optimizer")
        if program._local is not None:
            self._storages.mark(program._local.tensors(), "optimizer", elsewhere=False)
        self._storages.mark((local(tensor) for tensor in tensors(states)), "optimizer", elsewhere=self._offloaded)
        self._mark_category((p.grad for p in program.engine.parameters.values() if p.grad is not None), "gradients")

    def _mark_category(self, tensors: Iterable[Tensor], category: str) -> None:
        for tensor in tensors:
            self._storages.mark([local(tensor)], category, elsewhere=self._offloaded and is_split(tensor))

    def _when(self) -> str:
        """Return the current phase. In a forward or backward phase, autograd says whether a backward pass runs."""
        if self._base in ("forward", "backward") and torch._C._current_graph_task_id() != -1:
            return "recompute" if self._engine is not None and self._engine.recomputing else "backward"
        return self._base

    def _phase(self, when: str) -> str:
        """Return the current mark. A microbatch's mark says F (forward); in its backward pass that becomes B."""
        mark = self._mark
        return mark.replace("F", "B") if when in ("backward", "recompute") and mark[:1].isdigit() else mark

    # ---- observing --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if asks_for_device(func, args):
            return args[0].device
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # the subclass calls again with its local tensors
        kwargs = kwargs or {}
        when = self._when()
        phase = self._phase(when)
        if (when, phase) != self._stretch:
            self._stretch = when, phase
            self._storages.next(forward=when in ("forward", "recompute"))
        given = [self._storages.seen(tensor) for tensor in tensors((args, kwargs))]
        result = func(*args, **kwargs)
        elsewhere = self._offloaded and self._base == "optimizer"
        made = [self._storages.made(tensor, elsewhere=elsewhere) for tensor in tensors(result)]
        if is_collective(func):
            collective = collective_of(func, args, kwargs, result, self._axes, when or "report")
            self._communicate(phase, collective, work_of(result), made or given)
        else:
            kernel = kernel_of(func, args, kwargs, result, "optimizer" if when in ("", "weight", AVERAGE) else when)
            if kernel is not None:
                after = self._streams.kernel(len(self._events), (*given, *made))
                self._events.append(Event(phase, kernel, self._streams.current, after))
        return result

    def _communicate(self, phase: str, collective: Collective | None, work: Any, storages: Iterable[int]) -> None:
        """Record a collective, or without one that the program waits for those whose results lie in `storages`."""
        if collective is None:
            self._streams.wait_for_results(storages)
            return
        after = self._streams.collective(len(self._events), work, storages)
        self._events.append(Event(phase, collective, self._streams.current, after))


@contextmanager
def _wrapped(recorder: StepRecorder, program: Program) -> Iterator[None]:
    """Mark the parts of a program's steps by wrapping its methods while the context is open."""
    engine: Any = program.engine
    replaced: list[tuple[Any, str]] = []

    def around(owner: Any, name: str, describe: Callable[..., tuple[str | None, str | None]]) -> None:
        original = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with recorder.mark(*describe(*args)):
                return original(*args, **kwargs)

        setattr(owner, name, marked)
        replaced.append((owner, name))

    around(engine, "forward_backward", lambda *_: (None, "forward"))
    if program.workload.weight is not None:
        around(program, "_scales", lambda *_: (None, "weight"))
    around(program._update, "step", lambda *_: ("update", "optimizer"))
    if program._local is not None:
        around(program._local, "after_step", lambda *_: (AVERAGE, AVERAGE))
    if isinstance(engine, GraphEngine):
        pipeline: Any = engine._pipeline
        around(pipeline, "_forward", lambda _, action: (str(action), "forward"))
        around(pipeline, "_backward", lambda _, action: (str(action), "backward"))
        around(pipeline.weights, "compute", lambda key: (str(Action("W", *key)), "backward"))
        around(engine._local_stages, "reduce", lambda *_: ("reduce", "backward"))
    else:
        _count_microbatches(recorder, engine, replaced)
        if program.strategy.splits_parameters:
            around(engine.replicas, "average_whole", lambda *_: ("reduce", "backward"))
    try:
        yield
    finally:
        for owner, name in replaced:
            delattr(owner, name)


def _count_microbatches(recorder: StepRecorder, engine: Any, replaced: list[tuple[Any, str]]) -> None:
    """Mark the microbatches of a module that runs as it is: each begins when its data enter the engine."""
    original = engine._enter
    seen = 0

    def enter(microbatch: Any) -> Any:
        nonlocal seen
        recorder._mark = str(Action("F", 0, seen))
        seen += 1
        return original(microbatch)

    engine._enter = enter
    replaced.append((engine, "_enter"))
