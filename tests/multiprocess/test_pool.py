from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pools

from shardwise.errors import StrategyError


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


def test_hanging_and_dead_workers_are_replaced() -> None:
    workers = Pools()  # of its own: the others keep what they have imported and traced
    workers(2, rank_sum)
    with pytest.raises(TimeoutError, match=r"workers \[1\]"):
        workers(2, lambda: time.sleep(120) if dist.get_rank() == 1 else None, timeout=5.0)
    with pytest.raises(RuntimeError, match="worker 1 died with exit code 3"):
        workers(2, lambda: os._exit(3) if dist.get_rank() == 1 else None)
    workers.close()


def test_one_worker_is_this_process(workers: Pools) -> None:
    assert workers(1, os.getpid) == [os.getpid()]
