"""What a dry run gives a program in place of other workers, of memory and of data.

Of other workers there is torch's fake process group, whose collectives return at once: this process is a rank of a job
of any size. What a worker asks the others about (`parallel.values.facts`) they answer as it would answer itself. Memory
is that of tensors without data: a model is built on the meta device, and its parameters become fake tensors when they
would be read from files. Data are the first samples of the dataset, without their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from shardwise.parallel.data import ModuleEngine
from shardwise.parallel.engine import Engine
from shardwise.parallel.mesh import Allocating, forget_meshes
from shardwise.parallel.program import Program
from shardwise.parallel.staged import GraphEngine
from shardwise.parallel.values import facts
from shardwise.predict.accelerated import AsOnGPU
from shardwise.predict.counting import tensors
from shardwise.predict.models import batch
from shardwise.predict.updating import all_at_once
from shardwise.strategy import Strategy
from shardwise.workload.data import Microbatch, Share, cut_batch
from shardwise.workload.workload import Workload


@contextmanager
def fake_workers(rank: int, workers: int) -> Iterator[None]:
    """While it is open, this process is worker `rank` of so many; one worker needs no others.

    Raises:
        RuntimeError: it is a worker of real ones.
    """
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that is not a worker: it has a process group already")
    if workers == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=workers)
    try:
        with _lazy_chunks():
            yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


# ---- collectives ----------------------------------------------------------------------------------------------------


class Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What torch's DDP expects of a process group, and a fake one does not give. Opened inside of a `FakeTensorMode`.

    The future of a reduction holds what was reduced; and the order of the buckets, which DDP's first worker tells the
    others in tensors of whole numbers, has values.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rebuilding = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._rebuilding and _is_order(args, kwargs):
            with facts():
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if function is torch.ops.c10d.allreduce_.default:
            future: torch.futures.Future[Any] = torch.futures.Future()
            future.set_result(args[0])
            binding: Any = torch._C._distributed_c10d
            return result[0], binding._create_work_from_future(future).boxed()
        if function is torch.ops.c10d.recv_.default:
            for received in args[0]:
                received.zero_()  # where tensors have values, these must have some
        return result

    @contextmanager
    def following(self, engine: Engine) -> Iterator[None]:
        """Surrounds steps of an engine; what DDP does before a forward pass is watched."""
        wrapped: Any = replicated(engine)
        if wrapped is None:
            yield
            return
        original = wrapped._pre_forward

        def before_forward(*args: Any, **kwargs: Any) -> Any:
            self._rebuilding = True
            try:
                return original(*args, **kwargs)
            finally:
                self._rebuilding = False

        wrapped._pre_forward = before_forward
        try:
            yield
        finally:
            del wrapped._pre_forward


def replicated(engine: Engine) -> DistributedDataParallel | None:
    """What an engine has wrapped its model in; None where it replicates none by DDP."""
    called = engine.model_of_replicas if isinstance(engine, ModuleEngine) else None
    return called if isinstance(called, DistributedDataParallel) else None


def _is_order(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call is about the numbers of DDP's buckets (c10d: Reducer::sync_bucket_indices): all of them int32."""
    given = list(tensors((args, kwargs)))
    if not given:
        return kwargs.get("dtype") is torch.int32
    return all(tensor.dtype is torch.int32 and not isinstance(tensor, FakeTensor) for tensor in given)


@contextmanager
def _lazy_chunks() -> Iterator[None]:
    """`fully_shard` cuts each parameter into the parts of all workers to take its own: of 16,384, seconds for each."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    original = _fsdp_param._chunk_with_empty  # type: ignore[attr-defined]

    def chunked(tensor: Tensor, chunks: int, dim: int) -> Any:
        return _Chunks(tensor, chunks, dim) if tensor.is_meta else original(tensor, chunks, dim)

    with mock.patch.object(_fsdp_param, "_chunk_with_empty", chunked):
        yield


@dataclass(frozen=True, slots=True)
class _Chunks(Sequence[Tensor]):
    """The parts of a tensor as `torch.chunk` makes them, empty ones at the end, each when it is asked for."""

    tensor: Tensor
    chunks: int
    dim: int

    def __len__(self) -> int:
        return self.chunks

    def __getitem__(self, index: Any) -> Any:
        length = self.tensor.size(self.dim)
        size = -(-length // self.chunks)
        start = index * size
        if start >= length:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, min(size, length - start))


# ---- devices --------------------------------------------------------------------------------------------------------


@contextmanager
def as_on_gpu(program: Program) -> Iterator[None]:
    """Surrounds steps of a program that are to run the kernels of a GPU, on tensors without data.

    An optimizer that was not told otherwise takes all parameters at once, as it does by itself on a GPU, not on a host.
    """
    if program.optimizer is not None and not program.strategy.offload:
        all_at_once(program.optimizer)
    engine: Any = program.engine
    owner, name = (engine._keyed, "at") if isinstance(engine, GraphEngine) else (engine._operations, "_again")
    original = getattr(owner, name)

    @contextmanager
    def again(*args: Any, **kwargs: Any) -> Iterator[None]:
        with original(*args, **kwargs), AsOnGPU():  # torch's backward pass is out of the mode's sight
            yield

    with mock.patch.object(owner, name, again), AsOnGPU():
        yield


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoValues:
    """`stored.Weights` of a model whose parameters have no values: of no memory either."""

    shapes: dict[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return self.shapes[name]

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a parameter: one number, repeated."""
        return torch.zeros(()).expand(tuple(sizes))


@dataclass
class ModelWithoutValues:
    """A model factory: what `build` makes, its parameters on the meta device."""

    build: Callable[[], nn.Module]
    weights: NoValues = field(init=False)
    _built: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        module = self.build()
        named = module.named_parameters(remove_duplicate=False)
        self.weights = NoValues({name: tuple(parameter.shape) for name, parameter in named})
        self._built = [module]

    def __call__(self) -> nn.Module:
        """Builds the module."""
        return self._built.pop() if self._built else self.build()


# ---- data -----------------------------------------------------------------------------------------------------------


def first_share(workload: Workload, strategy: Strategy, replica: int, uniform: bool, allocating: Allocating) -> Share:
    """What one replica does in a step on the first samples of the dataset; each microbatch in memory of its own.

    Args:
        workload: whose dataset it is.
        strategy: with the number of microbatches settled.
        replica: which.
        uniform: see `workload.data.cut_batch`.
        allocating: surrounds what takes memory; it may give none, and the tensors no data.
    """
    rows = cut_batch(workload.batch_size, strategy.parts, strategy.microbatches, uniform=uniform)
    cells = [row[replica] for row in rows]
    data = batch(workload, len(cells[0]))

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    with allocating():
        microbatches = [Microbatch(tree_map(copied, data), len(cell), cell.start) for cell in cells]
    return Share(tuple(microbatches), workload.batch_size)
