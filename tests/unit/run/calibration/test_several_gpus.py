"""Several GPUs are measured: messages that fill their links, and computing while they communicate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.cluster.measure import machine
from shardwise.cluster.measure.collectives import sizes_on
from shardwise.run.calibration import calibrate
from shardwise.run.calibration.calibrate import _slowed, situations


def team(kind: str, workers: int) -> Any:
    return SimpleNamespace(device=torch.device(kind), hosts=[list(range(workers))])


@pytest.mark.parametrize(
    ("kind", "workers", "measured"),
    [("cuda", 1, []), ("cuda", 8, [(8, 1)]), ("cpu", 1, []), ("cpu", 4, [(4, 2)])],
)
def test_workers_that_communicate(
    kind: str, workers: int, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def overlap(team: Any, workers: int, threads: int, seconds: float) -> float:
        asked.append((workers, threads))
        return 1.25

    monkeypatch.setattr(calibrate, "overlap", overlap)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert _slowed(team(kind, workers), 0.1) == (1.25 if measured else 1.0)
    assert asked == measured
    assert kind == "cpu" or situations(team(kind, workers)) == [(1, 1)]  # kernels are measured alone


def test_messages_of_gpus_fill_their_links() -> None:
    # 450 GB/s for a millisecond; a bucket of gradients on a CPU has 25 MiB
    assert max(sizes_on(torch.device("cuda"))) > 450e9 * 1e-3
    assert max(sizes_on(torch.device("cpu"))) < 25 * 2**20
