"""The calls of `horovod.torch` on torch.distributed: a Horovod script runs by changing its import.

    import shardwise.compat.horovod as hvd       # in place of: import horovod.torch as hvd

    module          content
    world           init, ranks and sizes, process sets
    operations      collectives, with handles and gradients; `negotiation` orders them, `execution` runs them
    optimizer       DistributedOptimizer
    functions       broadcasts of parameters, optimizer state and plain values
    elastic         state that survives failures
    launching       local workers

Nothing that arrives from another rank is unpickled. docs/horovod.md lists what differs from Horovod.
"""

import torch

from shardwise.compat.horovod import elastic as elastic
from shardwise.compat.horovod.compression import Compressions as Compression
from shardwise.compat.horovod.functions import allgather_object as allgather_object
from shardwise.compat.horovod.functions import broadcast_object as broadcast_object
from shardwise.compat.horovod.functions import broadcast_optimizer_state as broadcast_optimizer_state
from shardwise.compat.horovod.functions import broadcast_parameters as broadcast_parameters
from shardwise.compat.horovod.launching import run as run
from shardwise.compat.horovod.operations import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    Sum,
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    join,
    poll,
    reducescatter,
    reducescatter_async,
    sparse_allreduce_async,
    synchronize,
)
from shardwise.compat.horovod.optimizer import DistributedOptimizer as DistributedOptimizer
from shardwise.compat.horovod.requests import HorovodInternalError as HorovodInternalError
from shardwise.compat.horovod.requests import HostsUpdatedInterrupt as HostsUpdatedInterrupt
from shardwise.compat.horovod.sync_batch_norm import SyncBatchNorm as SyncBatchNorm
from shardwise.compat.horovod.world import (
    ProcessSet,
    add_process_set,
    cross_rank,
    cross_size,
    get_process_set_ids_and_ranks,
    global_process_set,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    remove_process_set,
    shutdown,
    size,
)


def gloo_built() -> bool:
    """Return True: collectives on CPUs use gloo."""
    return True


def gloo_enabled() -> bool:
    """Return True: collectives on CPUs use gloo."""
    return True


def nccl_built() -> int:
    """Return the version of NCCL that collectives on GPUs use, such as 22703 for 2.27.3; 0 without GPUs."""
    if not torch.cuda.is_available():
        return 0
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return version[0] * 10000 + version[1] * 100 + version[2]


def cuda_built() -> bool:
    """Return whether tensors may be on GPUs of NVIDIA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Return whether tensors may be on GPUs of AMD."""
    return torch.version.hip is not None


def mpi_built() -> bool:
    """Return False: no collective uses MPI, also where MPI started the workers."""
    return False


def mpi_enabled() -> bool:
    """Return False, as `mpi_built`."""
    return False


def mpi_threads_supported() -> bool:
    """Return False, as `mpi_built`."""
    return False


def ddl_built() -> bool:
    """Return False: IBM's library is not used."""
    return False


def ccl_built() -> bool:
    """Return False: Intel's library is not used."""
    return False


__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "get_process_set_ids_and_ranks",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "run",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "synchronize",
]
