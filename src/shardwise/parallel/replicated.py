"""Replicated data parallel: every worker holds all of the model and torch's DDP averages the gradients.

DDP waits for a gradient of every parameter. One that a replica did not use in a step (a branch not taken, an expert
without tokens) would leave its bucket open and the others waiting. `find_unused_parameters` finds those by a walk over
the graph and one more collective in every step; here the backward pass is looked at when it is done, which is free, and
a replica that left parameters out gives a gradient of zero for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replicated:
    """A model on all replicas. `call` is what to call instead of the model; its gradients are means."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup,
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
                init_sync=False,  # the engine has made the replicas equal
                # saves a copy; but gradients that are parts of one bucket all look changed when one is (see below)
                gradient_as_bucket_view=not accumulates,
            )
        self._parameters = parameters
        self._before: dict[str, tuple[Tensor, int]] = {}
        self.unused: list[str] = []

    @contextmanager
    def microbatch(self, first: bool, last: bool) -> Iterator[None]:
        """Surrounds forward and backward pass of a microbatch; gradients are exchanged in the last one."""
        if not last:
            with self.call.no_sync():
                yield
            return
        # with accumulation a gradient is there before: whether this pass adds to it shows in its version
        self._before = {} if first else self._versions()
        yield
        self._complete()

    def reshard(self) -> None:
        """Nothing is gathered."""

    def _versions(self) -> dict[str, tuple[Tensor, int]]:
        return {n: (p.grad, p.grad._version) for n, p in self._parameters.items() if p.grad is not None}

    def _complete(self) -> None:
        missing = [name for name, parameter in self._parameters.items() if parameter.grad is None]
        before, self._before = self._before, {}  # kept, they would be there beside those of the next step
        for name, (gradient, version) in before.items():
            if self._parameters[name].grad is gradient and gradient._version == version:
                missing.append(name)
        self.unused = [name for name in missing if self._parameters[name].grad is None]
        if missing:
            # a backward pass of its own, in which DDP's hooks see the gradients that they wait for
            left_out = [self._parameters[name] for name in missing]
            torch.autograd.backward(left_out, [torch.zeros_like(parameter) for parameter in left_out])
