"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.launch.allocator import TUNABLES, keep_memory, starting
from shardwise.launch.local import run_local

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


HOLES = """
from shardwise.launch.allocator import keep_memory
import torch

keep_memory()

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))

def go(rounds):
    for _ in range(rounds):
        for size in (24, 3, 12, 6, 24):
            large = torch.ones(2**18 * size)  # MiB
            kept.append(torch.ones(3))
            del large

kept = []
go(1)  # what torch itself needs for the first time is no growth
before = anonymous()
go(60)
print(anonymous() - before)
"""


def of_process(program: str, **environment: str) -> str:
    """Return what a program prints in a process of its own."""
    chosen = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


def faults(**environment: str) -> tuple[bool, int]:
    """Return whether memory is kept, and how often the system had to give a page in ten steps of 164 MiB."""
    kept, count = of_process(STEPS, **environment).split()
    return kept == "1", int(count)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems have other allocators")


@glibc
def test_pages_are_not_cleared_anew() -> None:
    kept, ours = faults()
    left, usual = faults(MALLOC_TOP_PAD_="0")
    assert kept
    assert not left  # a person has chosen already
    assert ours * 10 < usual


@glibc
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell memory so")
def test_what_tensors_leave_is_taken_by_others_of_their_size() -> None:
    """Never more than one of 24 MiB at a time; the process may grow to two, and does to several without."""
    assert starting()
    ours, usual = int(of_process(HOLES, **starting())), int(of_process(HOLES))
    assert ours < 2 * 24 * 1024
    assert usual > 1.5 * ours


@pytest.mark.parametrize(
    ("name", "value"),
    [("LD_PRELOAD", "libjemalloc.so.2"), ("MALLOC_ARENA_MAX", "1"), (TUNABLES, "glibc.malloc.top_pad=0")],
)
def test_what_a_person_chose_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not starting()
    assert not keep_memory()


@glibc
def test_workers_start_with_it_and_nothing_stays_behind() -> None:
    before = os.environ.get(TUNABLES)
    assert run_local(os.getenv, (TUNABLES,), workers=1) == starting()[TUNABLES]
    assert os.environ.get(TUNABLES) == before
