"""Stand-ins that a dry run gives a program for other workers, for memory and for data.

workers   torch's fake process group, whose collectives return at once, so that this process is a rank of a job of any
          size. Questions to other workers (`parallel.state.pytree.facts`) get the answer that this worker gives itself.
memory    tensors without data: the model is built on the meta device, and its parameters become fake tensors at the
          point at which a real program reads them from files
data      the first samples of the dataset, without their values
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

from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.engine import Engine
from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.mesh import Allocating, forget_meshes
from shardwise.parallel.program import Program
from shardwise.predict.dry_run.device_queries import asks_for_device
from shardwise.predict.profile.gpu_ops import GPUDispatch
from shardwise.predict.profile.meta_model import batch
from shardwise.predict.profile.op_counter import tensors
from shardwise.predict.profile.optimizer import all_at_once
from shardwise.strategy import Strategy
from shardwise.workload.data import Microbatch, Share, cut_batch
from shardwise.workload.pytree import facts
from shardwise.workload.workload import Workload


@contextmanager
def fake_workers(rank: int, workers: int) -> Iterator[None]:
    """Make this process rank `rank` of `workers` inside the context; a single worker gets no process group.

    Raises:
        RuntimeError: The process has a process group already.
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
    """Mode that adds to torch's fake process group the results that DDP relies on.

    The future of an all-reduce holds the reduced tensors. The order of DDP's buckets, which rank 0 broadcasts in int32
    tensors, has real values. Open it inside a `FakeTensorMode`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rebuilding = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if asks_for_device(function, args):
            return args[0].device
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
                received.zero_()  # received tensors need defined values if tensors have data
        return result

    def rebuild_buckets(self, engine: Engine) -> None:
        """Rebuild DDP's buckets in the order of a first backward pass, as it does when the second step begins."""
        wrapped: Any = replicated(engine)
        if wrapped is None:
            return
        self._rebuilding = True  # the order of the buckets keeps its values
        try:
            wrapped.reducer._rebuild_buckets()
        finally:
            self._rebuilding = False


def replicated(engine: Engine) -> DistributedDataParallel | None:
    """Return the `DistributedDataParallel` around an engine's model. Returns None if the engine does not use DDP."""
    called = engine.model_of_replicas if isinstance(engine, ModuleEngine) else None
    return called if isinstance(called, DistributedDataParallel) else None


def _is_order(args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a call handles the order of DDP's buckets, which is sent as int32 tensors with real values.

    See c10d: Reducer::sync_bucket_indices.
    """
    given = list(tensors((args, kwargs)))
    if not given:
        return kwargs.get("dtype") is torch.int32
    return all(tensor.dtype is torch.int32 and not isinstance(tensor, FakeTensor) for tensor in given)


@contextmanager
def _lazy_chunks() -> Iterator[None]:
    """Make `fully_shard` create the shards of meta parameters on demand.

    It otherwise creates the shards of all workers to take its own: with 16,384 workers, seconds per parameter.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    original = _fsdp_param._chunk_with_empty  # type: ignore[attr-defined]

    def chunked(tensor: Tensor, chunks: int, dim: int) -> Any:
        return _Chunks(tensor, chunks, dim) if tensor.is_meta else original(tensor, chunks, dim)

    with mock.patch.object(_fsdp_param, "_chunk_with_empty", chunked):
        yield


@dataclass(frozen=True, slots=True)
class _Chunks(Sequence[Tensor]):
    """Chunks of a tensor as from `torch.chunk`, padded with empty ones at the end, each created on access."""

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
    """Make the steps of a program inside the context run the kernels of a GPU, on tensors without data.

    Unless configured otherwise, the optimizer updates all parameters at once (`foreach`), which is torch's default on a
    GPU only. An offloaded optimizer runs on the host and is left alone.
    """
    if program.optimizer is not None and not program.strategy.offload:
        all_at_once(program.optimizer)
    engine: Any = program.engine
    owner, name = (engine._operators, "at") if isinstance(engine, GraphEngine) else (engine._operations, "_again")
    original = getattr(owner, name)

    @contextmanager
    def again(*args: Any, **kwargs: Any) -> Iterator[None]:
        with GPUDispatch(), original(*args, **kwargs):  # modes opened outside do not reach the backward pass
            yield

    with mock.patch.object(owner, name, again), GPUDispatch():
        yield


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoValues:
    """Weights (see `weight_files.Weights`) of a model whose parameters have neither values nor memory."""

    shapes: dict[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.shapes[name]

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a box of a parameter of shape `sizes`: a single zero, expanded."""
        return torch.zeros(()).expand(tuple(sizes))


@dataclass
class ModelWithoutValues:
    """Model factory that calls `build`, which builds the model on the meta device, and knows its shapes beforehand."""

    build: Callable[[], nn.Module]
    weights: NoValues = field(init=False)
    _built: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        module = self.build()
        named = module.named_parameters(remove_duplicate=False)
        self.weights = NoValues({name: tuple(parameter.shape) for name, parameter in named})
        self._built = [module]

    def __call__(self) -> nn.Module:
        """Return the module built at initialization on the first call, a new one on each later call."""
        return self._built.pop() if self._built else self.build()


# ---- data -----------------------------------------------------------------------------------------------------------


def first_share(workload: Workload, strategy: Strategy, replica: int, uniform: bool, allocating: Allocating) -> Share:
    """Return one replica's share of a step on the first samples of the dataset.

    Every microbatch is a separate copy of the same samples, so that each has memory of its own.

    Args:
        workload: workload that owns the dataset.
        strategy: strategy with a definite number of microbatches.
        replica: index of the replica.
        uniform: see `workload.data.cut_batch`.
        allocating: context in which the tensors are created; under a fake-tensor mode they have no data.
    """
    rows = cut_batch(workload.batch_size, strategy.parts, strategy.microbatches, uniform=uniform)
    cells = [row[replica] for row in rows]
    data = batch(workload, len(cells[0]))

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    with allocating():
        microbatches = [Microbatch(tree_map(copied, data), len(cell), cell.start) for cell in cells]
    return Share(tuple(microbatches), workload.batch_size)
