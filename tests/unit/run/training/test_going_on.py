"""A training that ends in the middle and goes on: in this process, by the training loop itself."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk  # noqa: F401 - a fixture
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.parallel.program import Program
from shardwise.run.checkpoint import writer
from shardwise.run.training.execute import work
from shardwise.run.training.job import Job, Options
from shardwise.run.training.progress import Progress, restored
from shardwise.run.training.result import Trained
from shardwise.strategy import Strategy
from shardwise.workload.source import Source
from shardwise.workload.workload import Evaluation, Workload

STEPS = 4
"""Number of steps in an epoch."""


def small(**fields: Any) -> Workload:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8 * STEPS, 4, generator=generator), torch.arange(8 * STEPS) % 3)
    return Workload(
        **{
            "name": "small",
            "model": lambda: nn.Linear(4, 3),
            "dataset": data,
            "inputs": lambda batch: batch[0],
            "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            "batch_size": 8,
            "evaluation": Evaluation(
                dataset=data,
                metric="accuracy",
                measure=lambda output, batch: (output.argmax(1) == batch[1]).float().mean(),
            ),
            **fields,
        }
    )


def trained(folder: Path, workload: Workload | None = None, **options: Any) -> Trained:
    folder.mkdir(exist_ok=True)
    job = Job(
        source=Source(workload=workload or small()),
        strategy=Strategy(),
        options=Options(**{"epochs": 2, "checkpoint_every": 2, "quiet": True, **options}),
        folder=folder,
    )
    return work(job)


def records(folder: Path) -> list[tuple[int, Any]]:
    """(step, its loss or what was measured after it), in the order in which they are in metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("evaluation"))) for line in lines]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    trained(tmp_path / "whole", keep=9)
    return tmp_path / "whole"


def killed_in_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves what a run leaves that is killed while it evaluates after its first epoch."""

    def die(program: Program, numbers: Any) -> dict[str, float]:
        written = folder / "checkpoints" / f"step-{STEPS:08d}"
        for _ in range(2000):
            if written.exists():
                break
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Program, "evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            trained(folder)


@pytest.mark.parametrize("epochs", [2, 1])
def test_evaluation_that_was_cut_short_is_made(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    killed_in_evaluation(tmp_path / "cut", monkeypatch)
    assert [step for step, _ in records(tmp_path / "cut")] == [1, 2, 3, 4]
    result = trained(tmp_path / "cut", resume=True, epochs=epochs)
    expected = records(whole)
    if epochs == 1:  # nothing is left to train: the evaluation alone
        expected = expected[: STEPS + 1]
        assert result.summary["metrics"] == expected[-1][1]
    assert records(tmp_path / "cut") == expected


def test_evaluation_that_was_made_is_not_written_again(tmp_path: Path, whole: Path) -> None:
    for gone in (6, 8):  # the last checkpoint is the one before the evaluation
        shutil.rmtree(whole / "checkpoints" / f"step-{gone:08d}")
    expected = records(whole)
    assert expected[STEPS][0] == STEPS  # made, and in the file
    trained(whole, resume=True)
    assert records(whole) == expected


def test_run_that_has_all_its_steps_evaluates_nothing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = records(whole)
    monkeypatch.setattr(Program, "evaluate", lambda program, numbers: pytest.fail("evaluated"))
    assert trained(whole, resume=True).summary["metrics"] == expected[-1][1]
    assert records(whole) == expected


def test_run_without_a_checkpoint_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(tmp_path / "new", resume=True)
    assert f"{tmp_path / 'new'} holds no checkpoint yet: the run begins anew" in caplog.text


def test_failed_checkpoint_is_told_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def full(*args: Any) -> Any:
        failed.set()
        raise OSError(28, "No space left on device")

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        if (tmp_path / "run" / "checkpoints").exists():
            assert failed.wait(20)
        return F.cross_entropy(output, batch[1])

    monkeypatch.setattr(writer, "write_tensors", full)
    with pytest.raises(ShardwiseError, match=r"step-00000400 could not be written by worker 0: .*No space left"):
        trained(tmp_path / "run", small(loss=loss, evaluation=None), epochs=250, checkpoint_every=400)
    assert len(records(tmp_path / "run")) < 700


def test_full_disk(full_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with pytest.raises(ShardwiseError, match=r"(metrics.jsonl cannot|could not) be written.*No space left on device"):
        trained(full_disk / "run", epochs=10**6, checkpoint_every=0)
    assert "Traceback" not in capfd.readouterr().err
    (full_disk / "filling").unlink()
    before = len(records_whole(full_disk / "run"))
    trained(full_disk / "run", resume=True, epochs=before // STEPS + 3)


def records_whole(folder: Path) -> list[bytes]:
    return (folder / "metrics.jsonl").read_bytes().split(b"\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch is -1"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"batch": True}, "batch is True"),
        ({"loss": "low"}, "'loss' is 'low'"),
        ({"metrics": 5}, "progress.metrics is 5"),
        ({"metrics": {"accuracy": "high"}}, "'accuracy' is 'high'"),
        ({"seed": "x"}, "progress.seed is 'x'"),
        ({"more": 1}, "progress has 'more'"),
    ],
)
def test_progress_that_is_none(change: dict[str, Any], message: str) -> None:
    fresh = Progress(8, 0)
    saved: dict[str, Any] = {"batch_size": 8, "seed": 0, "epoch": 1, "batch": 2, "loss": 0.5, "metrics": {"x": 1.0}}
    assert restored(saved, fresh, 6) == Progress(**saved)
    with pytest.raises(CheckpointError, match=message):
        restored({**saved, **change}, fresh, 6)
    with pytest.raises(CheckpointError, match="progress has no batch"):
        restored({key: value for key, value in saved.items() if key != "batch"}, fresh, 6)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    """Halves the rate unless what it follows has halved."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


def each_epoch(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize(("schedule", "every"), [(each_epoch, "epoch"), (plateau, "metric")])
def test_schedules_by_epoch_and_by_metric(tmp_path: Path, schedule: Any, every: str) -> None:
    workload = small(schedule=schedule, schedule_every=every)
    alone = trained(tmp_path / "alone", workload, epochs=None, steps=3 * STEPS)
    rates = [step.learning_rate for step in alone.steps]
    # the first value is the best so far; only a schedule by epochs moves after it
    first = 1.0 if every == "metric" else 0.5
    assert rates == pytest.approx([0.1] * STEPS + [0.1 * first] * STEPS + [0.05 * first] * STEPS)
    for stop in (STEPS - 1, STEPS, STEPS + 1, 2 * STEPS):
        run = tmp_path / f"stopped at {stop}"
        before = trained(run, workload, epochs=None, steps=stop)
        after = trained(run, workload, epochs=None, steps=3 * STEPS, resume=True)
        together = [*before.steps, *after.steps]
        assert [step.learning_rate for step in together] == rates, stop
        assert [step.loss for step in together] == pytest.approx([step.loss for step in alone.steps], rel=1e-6)
