from __future__ import annotations

import os
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import warm
from command import Run, command

WORKLOAD = """
    import itertools, os, signal, time
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    from shardwise import Evaluation, Workload

    def small(
        batch_size: int = 8, samples: int = 28, fail: str = "", hidden: int = 6, pause: float = 0.0, slow: float = 0.0,
        fail_at: int = 3,
        when: str = "rank 1",
    ) -> Workload:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(samples, 4, generator=generator), torch.arange(samples) % 3)
        calls, passes = [], itertools.count()

        def slowed():
            number, rank = next(passes), int(os.environ.get("RANK", 0))
            return {"rank 1": rank == 1, "in turn": number % 2 == rank, "all": number % 5 == 0}[when]

        def loss(output, batch):
            if fail:  # tp and pp refuse a loss that changes values of its own
                calls.append(0)
            time.sleep(pause + (slow if slow and slowed() else 0.0))
            if fail and len(calls) == fail_at:
                misbehave(fail)
            return F.cross_entropy(output, batch[1])

        return Workload(
            name="small",
            model=lambda: nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3)),
            dataset=data,
            inputs=lambda batch: batch[0],
            loss=loss,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            batch_size=batch_size,
            evaluation=Evaluation(
                dataset=data,
                metric="accuracy",
                measure=lambda output, batch: (output.argmax(1) == batch[1]).float().mean(),
            ),
        )

    def misbehave(how):
        if how == "wait":
            print("waiting", flush=True)
            time.sleep(100)
        if os.environ["RANK"] == "1":
            print("failing at", time.time(), flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "sleep":
                time.sleep(100)
            if how == "leave":
                os._exit(0)
            raise ValueError("sample 17 is odd")

    def broken():
        return small().no_such_field

    def nothing():
        return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the file work.py in it."""
    (tmp_path / "work.py").write_text(textwrap.dedent(WORKLOAD))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """`run("train", ...)` in `folder`; fails unless the exit status is `status`."""

    def call(*arguments: str, status: int = 0, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        line = command(*arguments, launcher=launcher)
        done = warm.run(line, cwd=folder, timeout=400)
        assert done.returncode == status, done.stderr
        return done

    return call


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of all processes that the test starts."""
    value = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("SHARDWISE_TEST_MARK", value)
    return value
