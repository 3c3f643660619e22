"""Tests on the real engines, collected only if SHARDWISE_ENGINES is set, as `make engines` does."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

collect_ignore_glob = [] if os.environ.get("SHARDWISE_ENGINES") else ["test_*.py"]

WORKLOAD = """
    import os, signal, sys, time
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    from shardwise import Workload
    from shardwise.launch.context import rank_context

    def small(fail: str = "", pause: float = 0.0, lines: int = 0, batch_size: int = 12, samples: int = 36) -> Workload:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(samples, 4, generator=generator), torch.arange(samples) % 3)
        context, calls = rank_context(), []
        rank = context.rank if context else int(os.environ.get("RANK", 0))

        def loss(output, batch):
            calls.append(0)
            if len(calls) == 2 and context:
                place = f"{context.local_rank} of {context.local_workers}"
                print(f"rank {rank} of {context.workers}, {place}, by {context.engine}", flush=True)
            if len(calls) == 2:
                for number in range(lines):
                    print(f"line {number} of rank {rank} " + 200 * str(rank))
            time.sleep(pause)
            if len(calls) == 3 and fail and rank == 1:
                misbehave(fail)
            return F.cross_entropy(output, batch[1])

        return Workload(
            name="small",
            model=lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)),
            dataset=data,
            inputs=lambda batch: batch[0],
            loss=loss,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            batch_size=batch_size,
        )

    def misbehave(how):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("sample 17 is odd")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the file work.py in it."""
    (tmp_path / "work.py").write_text(textwrap.dedent(WORKLOAD))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")
    return tmp_path


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of all processes that the test starts."""
    value = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("SHARDWISE_TEST_MARK", value)
    return value


@pytest.fixture(scope="session")
def slurm_daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture
def slurm(slurm_daemons: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, for processes that the test starts."""
    for name, value in slurm_daemons.environment.items():
        monkeypatch.setenv(name, value)
    return slurm_daemons
