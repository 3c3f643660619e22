"""When a training evaluates, which checkpoint is the best, and when it stops early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from shardwise.errors import CheckpointError, RunFolderError, WorkloadError
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.run.checkpoint.folder import complete, step_of
from shardwise.run.training.execute import work
from shardwise.run.training.job import Job, Options
from shardwise.run.training.progress import Progress, restored
from shardwise.run.training.result import Trained
from shardwise.strategy import Strategy
from shardwise.workload.evaluation import Evaluation, Stopping
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

STEPS = 4
"""Number of steps in an epoch."""


def data(samples: int = 8 * STEPS) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 4, generator=generator), torch.arange(samples) % 3)


def of(values: list[float], **fields: Any) -> Evaluation:
    """An evaluation that reports these values one after the other."""
    fields = {"dataset": data(8), "metric": "score", **fields}
    return Evaluation(measure=lambda output, batch: torch.tensor(values.pop(0)), **fields)


def made(*evaluations: Evaluation, **fields: Any) -> Workload:
    return Workload(
        **{
            "name": "small",
            "model": lambda: nn.Linear(4, 3),
            "dataset": data(),
            "inputs": lambda batch: batch[0],
            "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            "batch_size": 8,
            "evaluation": evaluations or None,
            **fields,
        }
    )


def trained(workload: Workload, folder: Path | None = None, **options: Any) -> Trained:
    if folder is not None:
        folder.mkdir(exist_ok=True)
    chosen = Options(**{"epochs": 2, "quiet": True, "proof": False, **options})
    return work(Job(source=Source(workload=workload), strategy=Strategy(), options=chosen, folder=folder))


def kept(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in complete(folder / "checkpoints"))


def evaluated(folder: Path) -> list[tuple[int, list[str]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], list(line["evaluation"])) for line in lines if "evaluation" in line]


def test_each_evaluation_has_its_own_rhythm(tmp_path: Path) -> None:
    first, often = of([0.0] * 9), of([1.0] * 9, name="often", every=3, dataset=data(5))
    result = trained(made(first, often), tmp_path / "run", steps=7)
    both, other = ["loss", "score"], ["often/loss", "often/score"]
    assert evaluated(tmp_path / "run") == [(3, other), (4, both), (6, other), (7, [*both, *other])]
    assert result.summary["metrics"].keys() == {*both, *other}
    assert result.evaluations.keys() == {3, 4, 6, 7}


def each_epoch(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


@pytest.mark.parametrize(("schedule", "moves"), [(each_epoch, "epoch"), (plateau, "metric")])
def test_a_best_checkpoint_has_the_schedule_of_the_next_epoch(tmp_path: Path, schedule: Any, moves: str) -> None:
    better = Evaluation(
        dataset=data(),
        metric="surprise",
        measure=lambda output, batch: F.cross_entropy(output, batch[1]),
        higher_is_better=False,
    )
    workload = made(better, schedule=schedule, schedule_every=moves)
    run = tmp_path / "run"
    whole = trained(workload, run, epochs=4, keep=99)
    for step in (3 * STEPS, 4 * STEPS):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    rest = trained(workload, run, epochs=4, keep=99, resume=True)
    assert whole.summary["best_step"] == 4 * STEPS
    rates = [step.learning_rate for step in whole.steps]
    assert len(set(rates)) > 2
    assert [step.learning_rate for step in rest.steps] == rates[2 * STEPS :]


def test_a_schedule_follows_the_first_evaluation_after_each_epoch(tmp_path: Path) -> None:
    values = [1.0, 1.0, 1.0, 0.2, 0.2, 0.1]
    first = of(values, every=3, higher_is_better=False)
    other = of([9.0, 0.0, 9.0], name="other", higher_is_better=False)
    workload = made(first, other, schedule=plateau, schedule_every="metric")
    result = trained(workload, tmp_path / "run", epochs=3)
    assert [step for step, keys in evaluated(tmp_path / "run") if "score" in keys] == [3, 4, 6, 8, 9, 12]
    assert [step.learning_rate for step in result.steps] == [0.1] * 12  # after epochs it was 1.0, then 0.2, then 0.1


@pytest.mark.parametrize("end", [6, 7, 8])
def test_what_was_evaluated_is_the_same_if_the_run_goes_on(tmp_path: Path, end: int) -> None:
    def workload() -> Workload:
        return made(of([0.0] * 9), of([0.5] * 9, name="often", every=3))

    trained(workload(), tmp_path / "whole", steps=8, checkpoint_every=1, keep=99)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(end + 1, 9):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    trained(workload(), tmp_path / "cut", steps=8, checkpoint_every=1, keep=99, resume=True)
    assert evaluated(tmp_path / "cut") == evaluated(tmp_path / "whole")


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    values = [0.1, 0.7, 0.3, float("nan"), 0.7, 0.2]
    result = trained(made(of(values)), tmp_path / "run", epochs=6, keep=1)
    assert kept(tmp_path / "run") == [2 * STEPS, 6 * STEPS]
    assert result.summary["best_step"] == 2 * STEPS
    assert result.summary["best_metrics"]["score"] == pytest.approx(0.7)
    assert result.summary["metrics"]["score"] == pytest.approx(0.2)


def test_an_earlier_best_is_let_go(tmp_path: Path) -> None:
    workload = made(of([3.0, 2.0, 5.0, 6.0], higher_is_better=False))
    trained(workload, tmp_path / "run", epochs=4, keep=1)
    assert kept(tmp_path / "run") == [2 * STEPS, 4 * STEPS]


def test_the_best_is_saved_also_where_no_checkpoint_is_due(tmp_path: Path) -> None:
    trained(
        made(of([0.1, 0.9, 0.2, 0.3, 0.4], every=2)), tmp_path / "run", epochs=3, steps=9, checkpoint_every=100, keep=1
    )
    assert kept(tmp_path / "run") == [4, 9]


def test_the_best_is_exported_and_survives_a_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(made(of([0.1, 0.7, 0.3])), run, epochs=3, keep=1)
    export_safetensors(run, tmp_path / "early", best=True)
    result = trained(made(of([0.2, 0.6])), run, epochs=5, keep=1, resume=True)
    assert result.summary["best_step"] == 2 * STEPS
    assert kept(run) == [2 * STEPS, 5 * STEPS]
    export_safetensors(run, tmp_path / "best", best=True)
    export_safetensors(run, tmp_path / "newest")
    early, best, newest = (load_file(tmp_path / name)["weight"] for name in ("early", "best", "newest"))
    assert torch.equal(early, best)
    assert not torch.equal(best, newest)
    shutil.rmtree(run / "checkpoints" / f"step-{2 * STEPS:08d}")
    with pytest.raises(RunFolderError, match=r"the best checkpoint of run .*, step-00000008, is gone"):
        export_safetensors(run, tmp_path / "gone", best=True)


def test_a_run_without_evaluation_has_no_best(tmp_path: Path) -> None:
    summary = trained(made(), tmp_path / "run").summary
    assert (summary["best_step"], summary["best_metrics"], summary["stopped_early"]) == (None, None, False)
    with pytest.raises(RunFolderError, match="knows no best checkpoint"):
        export_safetensors(tmp_path / "run", tmp_path / "out", best=True)


def test_it_stops_if_nothing_improves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = [0.1, 0.5, 0.55, float("nan"), 0.58, 0.9, 0.9]
    rule = Stopping(metric="score", patience=3, min_delta=0.1)
    run = tmp_path / "run"
    result = trained(made(of(values), stop=rule), run, epochs=9, keep=1)
    assert result.summary["steps"] == 5 * STEPS
    assert result.summary["stopped_early"] is True
    assert result.summary["best_step"] == 5 * STEPS  # the best is no matter of `min_delta`
    told = "stopped early after step 20: score has not improved on 0.5 for 3 evaluations in a row"
    assert told in capfd.readouterr().err
    again = trained(made(of(values), stop=rule), run, epochs=9, resume=True)
    assert again.summary["steps"] == 5 * STEPS
    patient = Stopping(metric="score", patience=4, min_delta=0.1)
    on = trained(made(of(values), stop=patient), run, epochs=6, resume=True)
    assert (on.summary["steps"], on.summary["stopped_early"]) == (6 * STEPS, False)


def test_it_stops_within_an_epoch_and_evaluates_the_rest(tmp_path: Path) -> None:
    first, often = of([0.0] * 9), of([1.0, 2.0, 3.0], name="often", every=1, higher_is_better=False)
    rule = Stopping(metric="often/score", patience=1)
    result = trained(made(first, often, stop=rule), tmp_path / "run")
    assert result.summary["steps"] == 2
    assert evaluated(tmp_path / "run")[-1] == (2, ["loss", "score"])


def test_it_may_stop_by_the_loss() -> None:
    workload = made(of([0.0] * 9), stop=Stopping(metric="loss", patience=1, min_delta=10.0))
    assert trained(workload, epochs=5).summary["steps"] == 2 * STEPS


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"evaluation": [of([]), of([])]}, r"evaluation 2 \('score'\) has no name: give it one"),
        ({"evaluation": [of([], name="a"), of([], name="a")]}, "two evaluations have the name 'a'"),
        ({"evaluation": "accuracy"}, "evaluation must be an Evaluation or several, not 'accuracy'"),
        ({"stop": Stopping(metric="score", patience=1)}, "stop by 'score': there is no evaluation"),
        ({"stop": 3, "evaluation": of([])}, "stop must be a Stopping, not 3"),
        (
            {"stop": Stopping(metric="scores", patience=1), "evaluation": of([])},
            "stop by 'scores': reported are loss, score; did you mean 'score'",
        ),
    ],
)
def test_what_cannot_be_reported_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        made(**fields)


WRONG: dict[str, Any] = {"dataset": [], "metric": "m"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: of([], every=-1), "every=-1 of evaluation 'score': must be a whole number, 0 or more"),
        (lambda: of([], batch_size=2.5), "batch_size=2.5 of evaluation 'score'"),
        (lambda: of([], name="a/b"), "name='a/b' of evaluation 'a/b': must be a text without /"),
        (lambda: of([], metric=""), "metric='' of an evaluation"),
        (lambda: Evaluation(**{**WRONG, "measure": 3}), "measure of evaluation 'm' must be a function"),
        (lambda: Stopping(metric="m", patience=0), "patience=0 of stop: must be a whole number, 1 or more"),
        (lambda: Stopping(metric="m", patience=1, min_delta=-1.0), "min_delta=-1.0 of stop"),
    ],
)
def test_wrong_fields_are_refused(make: Any, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        make()


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.start = start

    def update(self, output: Any, batch: Any) -> None: ...
    def compute(self) -> int:
        return self.start

    def reset(self) -> None: ...


def two(output: Any, batch: Any, scale: float = 1.0) -> Any: ...


@pytest.mark.parametrize(
    ("measure", "collects"),
    [(Counter, True), (Counter(), True), (lambda: Counter(), True), (lambda start=3: Counter(start), True)]
    + [(two, False), (lambda output, batch: 0, False), (lambda *both: 0, False), (nn.MSELoss(), False), (max, False)],
)
def test_a_function_of_two_is_no_factory(measure: Any, collects: bool) -> None:
    assert Evaluation(dataset=[], metric="m", measure=measure).collects is collects


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"best": {"value": 1.0, "step": None}}, "step of best is None"),
        ({"best": {"value": "high", "step": 3}}, "'value' is 'high'"),
        ({"stopping": {"value": 1.0}}, "waited of stopping is None"),
        ({"evaluated": {"": "x"}}, "'' is 'x'"),
    ],
)
def test_progress_that_is_none(change: dict[str, Any], said: str) -> None:
    fresh = Progress(8, 0)
    saved: dict[str, Any] = {"batch_size": 8, "seed": 0, "epoch": 1, "batch": 2, "loss": 0.5, "metrics": {}}
    assert restored({**saved, "evaluated": 4}, fresh, 6).evaluated == {"": 4}  # an earlier version's
    with pytest.raises(CheckpointError, match=said):
        restored({**saved, **change}, fresh, 6)
