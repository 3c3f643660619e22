"""Small trainings of a calibration on a GPU: their memory is that of tensors, their steps wait for the device."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from shardwise.run.calibration import footprint as measured
from shardwise.run.calibration.footprint import footprint
from shardwise.run.calibration.trials import FootprintTrial
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


class OneGPU:
    """A team of one worker on a GPU."""

    size, rank, hosts = 1, 0, ((0,),)

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", 0)

    def wait(self) -> None:
        pass

    def gathered(self, values: list[float]) -> list[list[float]]:
        return [values]

    def most(self, values: list[float]) -> list[float]:
        return values


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """The workloads that are trained; nothing is."""
    found: list[Workload] = []

    def tried(team: Any, wanted: dict[str, tuple[Workload, Strategy]], count: int) -> dict[str, FootprintTrial]:
        found.extend(workload for workload, _ in wanted.values())
        return {name: FootprintTrial(strategy, 0.5) for name, (_, strategy) in wanted.items()}

    monkeypatch.setattr(measured, "Team", OneGPU)
    monkeypatch.setattr(measured, "_peak", lambda team, workload, strategy: 70 * 2**20)
    monkeypatch.setattr(measured, "_tried", tried)
    monkeypatch.setattr(measured, "_trained", lambda team, workload, strategy: FootprintTrial(strategy, 0.5))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 64 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return found


def test_a_gpu_gets_the_overheads_and_the_workspaces_of_small_trainings(trained: list[Workload]) -> None:
    found = footprint()
    assert found.process == {"module": 70 * 2**20}
    assert set(found.trials) == {"plain", "step", "again", "selective"}
    assert found.grown == 6 * 2**20
    assert found.trained.seconds == 0.5


def test_the_large_training_keeps_a_gpu_busy(trained: list[Workload]) -> None:
    large = footprint().large
    assert large in trained
    with torch.device("meta"):
        parameters = large.model().parameters()
    flops = 6 * sum(p.numel() for p in parameters) * large.batch_size * (64 // 2) ** 2
    assert flops > 1e12  # milliseconds at 100 TFLOP/s, where a host launches its kernels in less


def test_memory_on_a_gpu_never_counts_the_process(trained: list[Workload]) -> None:
    with mock.patch.object(measured, "own_memory", side_effect=AssertionError):
        footprint()
