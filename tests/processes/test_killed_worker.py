"""A worker of parameter servers that is killed is started again, and the training goes on where the servers stand."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import WorkerFailed
from shardwise.launch.regroup import RESTARTS_SETTING
from shardwise.run.training.execute import run_job
from shardwise.run.training.job import Job, Options
from shardwise.run.training.result import Trained
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

WORKLOAD = """
    import os, signal, time
    from pathlib import Path
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    from shardwise import Evaluation, Workload

    def dying(
        at: str = "", marks: str = "", normed: bool = False, averaged: bool = False, slow: float = 0.0,
        samples: int = 40,
    ) -> Workload:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(samples, 4, generator=generator)
        data = TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())
        calls = []
        rank = os.environ.get("RANK", "")

        def die(what):
            for each in at.split():
                mark = Path(marks, each.replace(":", "-"))
                if each == f"{rank}:{what}" and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        def loss(output, batch):
            calls.append(0)
            die(len(calls))
            if slow and Path(marks).exists() and any(Path(marks).iterdir()):  # from the death until it is back
                back = Path(marks).with_name("back")
                if rank == at[0]:
                    back.touch()
                elif not back.exists():
                    time.sleep(slow)
            return F.cross_entropy(output, batch[1])

        def accuracy(output, batch):
            die("evaluation")
            return (output.argmax(1) == batch[1]).float().mean()

        def model():
            norm = [nn.BatchNorm1d(8)] if normed else []
            return nn.Sequential(nn.Linear(4, 8), *norm, nn.ReLU(), nn.Linear(8, 3))

        return Workload(
            name="dying",
            model=model,
            dataset=data,
            inputs=lambda batch: batch[0],
            loss=loss,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2),
            schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.98),
            batch_size=6,
            average=0.9 if averaged else None,
            evaluation=Evaluation(dataset=data, metric="accuracy", measure=accuracy),
        )
"""


def trained(folder: Path, strategy: str, at: str = "", *, steps: int = 14, **settings: Any) -> Trained:
    """Train, and kill a worker RANK at its loss CALL or in its first evaluation, for each `RANK:CALL` in `at`."""
    work, marks = folder / "dying.py", folder / "marks"
    work.write_text(textwrap.dedent(WORKLOAD))
    marks.mkdir(exist_ok=True)
    name = f"{work}:dying"
    source = Source(workload=name, settings={"at": at, "marks": str(marks), **settings})
    out = folder / f"out-{at.replace(':', '-').replace(' ', '_')}"
    out.mkdir()
    options = Options(steps=steps, quiet=True, weights=True)
    found = run_job(
        Job(source=source, strategy=Strategy.parse(strategy), options=options, folder=out), threads=1, gpus=False
    )
    assert len(list(marks.iterdir())) == len(at.split()), "no worker was killed"
    return found


def assert_alike(found: Trained, expected: Trained) -> None:
    assert found.weights is not None
    assert expected.weights is not None
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    assert found.summary["metrics"] == expected.summary["metrics"]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Trained]:
    """`unharmed(normed)` -> the run in which nobody is killed."""

    @cache
    def of(normed: bool) -> Trained:
        return trained(tmp_path_factory.mktemp("unharmed"), "ps=2,dp=2", normed=normed)

    return of


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize(("at", "normed"), [("1:8", True), ("0:9", False), ("1:7 0:4", False), ("1:evaluation", True)])
def test_the_training_of_synchronous_servers_is_that_of_a_run_without_a_kill(
    tmp_path: Path, at: str, normed: bool, unharmed: Callable[[bool], Trained]
) -> None:
    expected = unharmed(normed)
    found = trained(tmp_path, "ps=2,dp=2", at, normed=normed)
    assert_alike(found, expected)
    assert {each["rank"] for each in found.summary["restarted_workers"]} == {int(each[0]) for each in at.split()}
    assert all(each["left_out"] == 0 for each in found.summary["restarted_workers"])
    lines = [json.loads(line) for line in (Path(found.summary["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "samples" in line] == list(range(1, 15)), "a step was logged twice"


@pytest.mark.parametrize("staleness", ["2", "unbounded"])
def test_others_go_on_without_waiting_and_the_worker_joins_where_they_are(tmp_path: Path, staleness: str) -> None:
    strategy = f"ps=2,dp=3,staleness={staleness}"
    found = trained(tmp_path, strategy, "0:6", steps=400, slow=0.2, samples=3000)
    (again,) = found.summary["restarted_workers"]
    assert found.summary["steps"] == 400
    assert again["rank"] == 0
    assert 10 < again["step"] < 400, "the others did not go on"
    assert again["left_out"] > 3
    assert found.summary["loss"] < 0.7
    (note,) = (each for each in found.summary["notes"] if "was killed" in each)
    assert note == (
        f"worker 0 was killed, and joined again after step {again['step']}; its part of {again['left_out']} batches "
        "was left out"
    )


@pytest.mark.usefixtures("warm_workers")
def test_a_run_that_cannot_go_on_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerFailed, match="worker 1 was killed by SIGKILL"):
        trained(tmp_path, "ps=1,dp=2", "1:8", averaged=True)
    monkeypatch.setenv(RESTARTS_SETTING, "0")
    (tmp_path / "off").mkdir()
    with pytest.raises(WorkerFailed, match="worker 1 was killed by SIGKILL"):
        trained(tmp_path / "off", "ps=1,dp=2", "1:8")
