"""What a workload's optimizer does to each element of a parameter, seen on two parameters without data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.predict.analysis import LinkRecorder
from shardwise.predict.kernel import Kernel
from shardwise.predict.profile import Update
from shardwise.workload.workload import Workload

_SIDE = 256
"""Of the matrices that are updated; large enough that what is not done per element does not count."""


def update_of(workload: Workload) -> Update:
    """The kernels of one element in a later step (in the first one the state is made), and the bytes of its state."""
    one, _ = _updated(workload, 1)
    two, state = _updated(workload, 2)
    elements = 2 * _SIDE**2
    return Update(
        tuple(two[: len(one)]) if len(one) == len(two) else tuple(one), state / elements, len(one) == len(two)
    )


def _updated(workload: Workload, count: int) -> tuple[list[Kernel], int]:
    """Kernels of a step on so many matrices, per element of all of them, and bytes of the state."""
    recorder = LinkRecorder()
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(_SIDE, _SIDE)) for _ in range(count)]
        optimizer = workload.optimizer(list(parameters))
        for number in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty(_SIDE, _SIDE)
            if number:
                with recorder:
                    optimizer.step()
            else:
                optimizer.step()
        held = [value for state in optimizer.state.values() for value in state.values()]
    elements = count * _SIDE**2
    kernels = [_per_element(kernel, elements) for kernel in recorder.take().kernels if kernel.bytes >= elements]
    return kernels, sum(_bytes(value) for value in held)


def _per_element(kernel: Kernel, elements: int) -> Kernel:
    return replace(kernel, flops=kernel.flops / elements, bytes=kernel.bytes / elements, shape=(1,))


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) and value.dim() else 0
