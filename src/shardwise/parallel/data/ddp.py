"""Replicated data parallelism: every worker holds the whole model, and torch's DDP averages the gradients.

DDP waits for a gradient of every parameter. A parameter that a replica did not use in a step (a branch not taken, an
expert without tokens) would leave its bucket open and the other replicas waiting. `find_unused_parameters` finds such
parameters with a walk over the graph and one more collective in every step. Here they are found for free after the
backward pass, and the replica then supplies a gradient of zero for them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from shardwise.launch import waiting
from shardwise.parallel.data.reducer import Flat, Pending, Reducer


class ReplicatedModel:
    """Model replicated by DDP. Call `call` instead of the model; its gradients are means over the replicas."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup,
        reducer: Reducer,
        *,
        accumulates: bool,
        bucket: int = 0,
    ) -> None:
        with warnings.catch_warnings():
            # torch 2.13 wants `forward_sync_buffers` instead, which torch 2.9 does not know
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.call = DistributedDataParallel(
                model,
                process_group=group,
                broadcast_buffers=False,
                bucket_cap_mb=bucket or None,
                init_sync=False,  # the engine has already made the replicas equal
                # saves a copy; but gradients that are views of one bucket all look changed when one is (see below)
                gradient_as_bucket_view=not accumulates,
            )
        self._reducer = reducer
        if not reducer.native or reducer.dtype is not None:
            self.call.register_comm_hook(None, _weakly(self._join))
        self._parameters = parameters
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._open: list[tuple[Pending, Tensor, torch.futures.Future[Tensor]]] = []
        self._before: dict[str, tuple[Tensor, int]] = {}
        self.unused: list[str] = []
        self._computed = 0.0

    @contextmanager
    def microbatch(self, first: bool, last: bool) -> Iterator[None]:
        """Surround the forward and backward pass of a microbatch. The last one all-reduces the gradients."""
        if not last:
            with self.call.no_sync():
                yield
            return
        # with accumulation a gradient exists already: its version shows whether this pass adds to it
        self._before = {} if first else self._versions()
        yield
        if self._computed:
            waiting.add(self._computed)
            self._computed = 0.0
        self._complete()

    def before_backward(self, loss: Tensor) -> None:
        """Note when the backward pass of `loss` has computed: what DDP does after that is to wait for its messages."""
        if waiting.counts():
            queue = torch.autograd.Variable._execution_engine.queue_callback
            loss.register_hook(lambda _: queue(self._note_computed))  # type: ignore[no-untyped-call]

    def _join(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start to average a bucket's gradients, and return a future of them: DDP's communication hook."""
        flat, parameters = bucket.buffer(), bucket.parameters()
        what = Flat(tuple(self._names[p] for p in parameters), tuple(tuple(p.shape) for p in parameters))
        pending = self._reducer.all_reduce(flat, what, mean=True)
        future = pending.future(flat)
        if future is None:
            future = torch.futures.Future(devices=[flat.device] if flat.is_cuda else [])
            if not self._open:  # DDP itself waits in a callback that it queues after its last bucket
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            self._open.append((pending, flat, future))
        return future

    def _finish(self) -> None:
        """Complete the reductions of all buckets."""
        for pending, flat, future in self._open:
            pending.wait()
            future.set_result(flat)
        self._open.clear()
        if self._computed:  # these waits are counted already
            self._note_computed()

    def _note_computed(self) -> None:
        self._computed = time.perf_counter()

    def reshard(self) -> None:
        """Do nothing: no parameter is gathered."""

    def _versions(self) -> dict[str, tuple[Tensor, int]]:
        return {n: (p.grad, p.grad._version) for n, p in self._parameters.items() if p.grad is not None}

    def _complete(self) -> None:
        missing = [name for name, parameter in self._parameters.items() if parameter.grad is None]
        before, self._before = self._before, {}  # or they stay allocated beside the next step's
        for name, (gradient, version) in before.items():
            if self._parameters[name].grad is gradient and gradient._version == version:
                missing.append(name)
        self.unused = [name for name in missing if self._parameters[name].grad is None]
        if missing:
            # a separate backward pass, in which DDP's hooks see the gradients that they wait for
            left_out = [self._parameters[name] for name in missing]
            torch.autograd.backward(left_out, [torch.zeros_like(parameter) for parameter in left_out])


def _weakly(join: Callable[[GradBucket], torch.futures.Future[Tensor]]) -> Callable[..., Any]:
    """Return a communication hook that keeps no reference to its owner, which refers to DDP.

    Python cannot free a cycle through the hook that DDP holds in C++. DDP checks annotations of hooks that have any.
    """
    method: Any = WeakMethod(join)
    return lambda _, bucket: method()(bucket)
