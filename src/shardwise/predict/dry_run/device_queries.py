"""Questions of torch's C++ code for the device of a tensor without data: two of three calls that a dry run dispatches.

Autograd asks several times for each tensor. A dispatch mode that passes the question on costs as much time as one that
passes on an operation, so the modes of a dry run answer it themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_DEVICE = torch.ops.prim.device.default


def asks_for_device(function: Any, args: Any) -> bool:
    """Return whether a dispatched call asks for the device of a fake tensor, which its attribute `device` tells."""
    return function is _DEVICE and type(args[0]) is FakeTensor
