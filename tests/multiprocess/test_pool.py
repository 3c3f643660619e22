from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import perceptron
from pool import Pools

from shardwise.errors import StrategyError
from shardwise.parallel.program import Program
from shardwise.strategy import Strategy


def rank_sum() -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def test_results_come_by_rank(workers: Pools) -> None:
    assert workers(2, rank_sum) == [(0, 1.0), (1, 1.0)]
    assert workers(2, lambda x: x + dist.get_world_size(), 3) == [5, 5]


def test_exception_of_one_worker_is_raised_and_the_next_call_works(workers: Pools) -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise StrategyError("no")
        dist.barrier()

    with pytest.raises(StrategyError, match="no") as info:
        workers(2, fail)
    assert "in fail" in str(info.value.__cause__)
    assert workers(2, rank_sum) == [(0, 1.0), (1, 1.0)]


def test_hanging_and_dead_workers_are_replaced(workers: Pools) -> None:
    workers = workers.apart()  # the others keep what they have traced
    workers(2, rank_sum)
    with pytest.raises(TimeoutError, match=r"workers \[1\]"):
        workers(2, lambda: time.sleep(120) if dist.get_rank() == 1 else None, timeout=5.0)
    with pytest.raises(RuntimeError, match="worker 1 died with exit code 3"):
        workers(2, lambda: os._exit(3) if dist.get_rank() == 1 else None)
    workers.close()


def test_groups_of_earlier_calls_are_gone(workers: Pools) -> None:
    """Each keeps three threads that poll: enough of them take all of the cores."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def train(strategy: str) -> None:
        program = Program.build(perceptron(), Strategy.parse(strategy))
        program.step_share(next(program.loader().shares(0)))

    before = workers(4, threads)
    for strategy in ("dp=2,fsdp=2", "dp=2,pp=2", "fsdp=2,tp=2"):
        workers(4, train, strategy)
        assert workers(4, threads) == before, strategy


def test_workers_hash_and_draw_differently(workers: Pools) -> None:
    first, second = workers(2, lambda: (hash("tp"), random.random(), np.random.random()))
    assert not set(first) & set(second)


def test_no_worker_outlives_the_tests(tmp_path: Path) -> None:
    script = """
import os, signal
import pool
if __name__ == "__main__":
    pool.PRELOAD = ("torch",)
    print(*pool.Pools(pool.Servers())(2, os.getpid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL
    processes = [Path("/proc", number) for number in done.stdout.split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 120
    while any(process.exists() for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def test_one_worker_is_this_process(workers: Pools) -> None:
    assert workers(1, os.getpid) == [os.getpid()]
