"""Tests on the real engines, collected only if SHARDWISE_ENGINES is set, as `make engines` does."""

from __future__ import annotations

import os
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from daemons import Daemons
from other_clusters import ray_cluster, spark_cluster
from slurm_cluster import SlurmCluster
from ways import THREE

collect_ignore_glob = [] if os.environ.get("SHARDWISE_ENGINES") else ["test_*.py"]


LONGEST = ("hosts", "slurm", "spark")
"""Groups that take the longest; what begins last should be short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest groups begin first."""

    def turn(item: pytest.Item) -> int:
        names = [mark.args[0] for mark in item.iter_markers("xdist_group")]
        return min([LONGEST.index(name) for name in names if name in LONGEST], default=len(LONGEST))

    items.sort(key=turn)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run where groups are not kept: tests of one group use the same hosts (pytest-xdist#1386)."""
    grouped = (item for item in session.items if item.get_closest_marker("xdist_group") is not None)
    if "PYTEST_XDIST_WORKER" in os.environ and any("@" not in item.nodeid.rpartition("]")[2] for item in grouped):
        raise pytest.UsageError("pytest-xdist does not keep the groups of tests together: use pytest below 9.2")


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


SETTINGS = {"OMP_NUM_THREADS": "1", "SHARDWISE_CLUSTER": "off"}


def write_work(folder: Path) -> None:
    (folder / "work.py").write_text(textwrap.dedent(WORKLOAD))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the file work.py in it."""
    write_work(tmp_path)
    monkeypatch.chdir(tmp_path)
    put(SETTINGS, monkeypatch)
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


@pytest.fixture(scope="session")
def ray_daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    cluster = ray_cluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def spark_daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    cluster = spark_cluster(tmp_path_factory.mktemp("spark"))
    yield cluster
    cluster.close()


def put(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def slurm(slurm_daemons: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster of Slurm, for processes that the test starts."""
    put(slurm_daemons.environment, monkeypatch)
    return slurm_daemons


@pytest.fixture
def ray(ray_daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> Daemons:
    """The cluster of Ray, for processes that the test starts."""
    put(ray_daemons.environment, monkeypatch)
    return ray_daemons


@pytest.fixture
def spark(spark_daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> Daemons:
    """The cluster of Spark, for processes that the test starts."""
    put(spark_daemons.environment, monkeypatch)
    return spark_daemons


@pytest.fixture(scope="session")
def run_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps that three workers of torchrun have trained."""
    folder = tmp_path_factory.mktemp("three")
    write_work(folder)
    around = os.environ | SETTINGS
    done = subprocess.run(THREE, cwd=folder, env=around, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out"
