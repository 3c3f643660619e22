"""Work and memory of a workload's optimizer per element, recorded on one and on two parameters without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.errors import StrategyError
from shardwise.parallel.optim.eight_bit import EightBitStates, check_states
from shardwise.parallel.optim.making import as_one
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.op_counter import tensors
from shardwise.predict.profile.profile import Update
from shardwise.predict.profile.segment_recorder import SegmentRecorder
from shardwise.workload.workload import Workload

_SIDE = 256
"""Rows and columns of the recorded parameters; large enough that costs which are not per element do not count."""


def update_of(workload: Workload) -> Update:
    """Return the kernels, the state and the temporary bytes of an update per element.

    They are recorded in the second step, because the first one allocates the state.
    """
    one, two = _updated(workload, 1), _updated(workload, 2)
    together = len(one.kernels) == len(two.kernels)
    return Update(
        kernels=two.kernels[: len(one.kernels)] if together else one.kernels,
        state_bytes=two.state_bytes,
        together=together,
        temporary_bytes=_updated(workload, 2, on_gpu=True).temporary_bytes,
        eight_bit=_eight_bit(workload),
    )


def _eight_bit(workload: Workload) -> Update | None:
    """Return the update with states in 8 bits. Returns None if the optimizer cannot have them."""
    try:
        found = _updated(workload, 1, on_gpu=True, eight_bit=True)
    except StrategyError:
        return None
    return replace(found, one_by_one=True)


def all_at_once(optimizer: torch.optim.Optimizer) -> None:
    """Set `foreach` on an optimizer unless the user chose otherwise: the default of torch on a GPU."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def _updated(workload: Workload, count: int, *, on_gpu: bool = False, eight_bit: bool = False) -> Update:
    """Record an update of `count` matrices; costs are per element.

    Raises:
        StrategyError: the optimizer cannot have states in 8 bits.
    """
    recorder = SegmentRecorder(cpu=False)
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(_SIDE, _SIDE)) for _ in range(count)]
        optimizer = _made(workload, parameters)
        if on_gpu:
            all_at_once(optimizer)
        if eight_bit:
            check_states(optimizer, workload.name)
        update = EightBitStates(optimizer) if eight_bit else optimizer
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty(_SIDE, _SIDE)
            recorder.take()
            before = recorder.watch()
            with recorder:
                update.step()
        held = list(tensors(list(optimizer.state.values())))
        held += parameters if workload.average is not None else []
    elements = count * _SIDE**2
    least = 0 if eight_bit else elements  # one by one, kernels on a few numbers are launched for each parameter
    kernels = [_per_element(kernel, elements) for kernel in recorder.take().kernels if kernel.bytes >= least]
    return Update(
        kernels=tuple(kernels),
        state_bytes=sum(_bytes(value) for value in held) / elements,
        temporary_bytes=(recorder.peak - before) / elements,
    )


def _made(workload: Workload, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the workload's optimizer over matrices, beside a single number if it needs others than matrices too."""

    def over(given: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        groups: list[Any] = list(given) if workload.groups is None else [{"params": list(given)}]
        return as_one(workload.optimizer(groups))

    try:
        return over(parameters)
    except ValueError:  # one of several optimizers gets no matrix, or nothing else
        return over([*parameters, nn.Parameter(torch.empty(1))])


def _per_element(kernel: Kernel, elements: int) -> Kernel:
    return replace(kernel, flops=kernel.flops / elements, bytes=kernel.bytes / elements, shape=(1,))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size() if value.dim() else 0
