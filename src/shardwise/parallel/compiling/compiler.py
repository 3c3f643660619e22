"""Torch's compiler on this machine: what it needs, and how it is called."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardwise.errors import StrategyError
from shardwise.strategy import Strategy


def check_compiler(strategy: Strategy, device: str) -> None:
    """Check that this machine has what `compile=1` needs.

    Args:
        strategy: the strategy.
        device: kind of device, `cpu` or `gpu`.

    Raises:
        StrategyError: a compiler, its headers or triton are missing.
    """
    if not strategy.compile:
        return
    for there, what, remedy in _needs(device):
        if not there:
            raise StrategyError(f"compile=1 needs {what}: install {remedy}, or leave compile=1 out")


def _needs(device: str) -> list[tuple[bool, str, str]]:
    """Return what the compiler needs: (whether it is there, what it is, the package that has it)."""
    compiler = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    found = [
        (shutil.which(compiler) is not None, f"a C++ compiler, and there is no {compiler}", "the package g++"),
        (headers.is_file(), f"Python's headers, and there is no {headers}", "the package python3-dev"),
    ]
    if device == "gpu":
        found.append((find_spec("triton") is not None, "triton, which is not installed", "the package triton"))
    return found


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled by torch, for the shapes that it is called with, as one graph.

    Compilation itself starts with the first call. It starts no processes of its own: they could outlive this one.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled
