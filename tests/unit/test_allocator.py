"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from shardwise.launch.allocator import keep_memory

STEPS = """
import resource
from shardwise.launch.allocator import keep_memory
import torch

kept = keep_memory()

def step():
    activations = [torch.ones(2**20 * size) for size in (16, 3, 12, 1, 9)]  # 4 MiB and more

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and how often the system had to give a page in ten steps of 164 MiB."""
    chosen = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "1", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems have other allocators")
def test_pages_are_not_cleared_anew() -> None:
    kept, ours = faults()
    left, usual = faults(MALLOC_TOP_PAD_="0")
    assert kept
    assert not left  # a person has chosen already
    assert ours * 10 < usual


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert not keep_memory()
