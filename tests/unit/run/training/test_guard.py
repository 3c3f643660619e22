"""A training on one worker skips, stops or goes on at a step that is not finite, and leaves the right checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.commands.request import settle_options
from shardwise.errors import CheckpointError, NotFinite, RequestError
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.run.checkpoint.index import Index
from shardwise.run.training.guard import MOST_SKIPPED, Guard
from shardwise.run.training.job import Job, Options
from shardwise.run.training.result import Trained
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

SAMPLES, BATCH = 16, 2


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SAMPLES, 4, generator=generator), torch.arange(SAMPLES) % 3]


class Broken(TensorDataset):
    """Batches of nan from the step `bad` on, `count` of them: no sample of another batch is nan."""

    def __init__(self, bad: int = 5, count: int = 1) -> None:
        super().__init__(*samples())
        self.calls, self.bad, self.count = 0, bad, count

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.calls += 1
        x, y = self.tensors
        value = math.nan if self.bad <= self.calls < self.bad + self.count else 0.0
        return [(x[index] + value, y[index]) for index in indices]


def workload(**changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "sick",
        "model": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        "dataset": Broken(),
        "inputs": lambda batch: batch[0],
        "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "batch_size": BATCH,
    }
    return Workload(**{**options, **changes})


def run(folder: Path | None, on_nan: str, *, steps: int = 8, resume: bool = False, **changes: Any) -> Trained:
    work = workload(**changes)
    options = Options(steps=steps, checkpoint_every=1, keep=2, resume=resume, quiet=True, on_nan=on_nan, proof=False)
    job = Job(source=Source(workload=work), strategy=Strategy(), options=options, folder=folder)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return train(Program.build(work, Strategy()), job)


def checkpoints(folder: Path) -> dict[int, bool]:
    """Step -> whether its checkpoint is finite."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    return {int(path.name.removeprefix("step-")): Index.read(path).progress["finite"] for path in found}


def test_it_stops_before_the_update_and_leaves_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFinite) as stopped:
        run(tmp_path / "run", "stop")
    message = str(stopped.value)
    assert message.startswith("step 5: the loss is nan; the first that is not finite is module '0', of a batch that")
    assert message.endswith(
        f"the last finite checkpoint is {tmp_path}/run/checkpoints/step-00000004: --resume, with a lower learning rate "
        "or --on-nan skip"
    )
    assert "\n" not in message
    assert capfd.readouterr().err == ""
    assert checkpoints(tmp_path / "run") == {3: True, 4: True}
    assert all(json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_where_it_stopped_it_goes_on_with_that_batch(tmp_path: Path) -> None:
    with pytest.raises(NotFinite):
        run(tmp_path, "stop", dataset=Broken(bad=5))
    resumed = run(tmp_path, "stop", resume=True, dataset=Broken(bad=0))
    undisturbed = run(None, "stop", dataset=Broken(bad=0))
    assert [step.loss for step in resumed.steps] == [step.loss for step in undisturbed.steps[4:]]


def test_without_a_checkpoint_it_says_so() -> None:
    with pytest.raises(NotFinite, match="there is no checkpoint before it: begin anew"):
        run(None, "stop")


def test_skipped_steps_are_counted_and_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = run(tmp_path / "run", "skip", dataset=Broken(bad=3, count=2))
    assert trained.summary["steps"] == 8
    assert trained.summary["skipped_steps"] == 2
    assert trained.summary["first_not_finite_step"] == 3
    assert math.isfinite(trained.summary["loss"])
    said = capfd.readouterr().err.splitlines()
    told = [line for line in said if "update is skipped" in line]  # beside what torch may say of the machine
    assert len(told) == 1, said
    assert told[0].startswith("step 3: the loss is nan; ")
    assert told[0].endswith("its update is skipped, further ones are not told")
    assert checkpoints(tmp_path / "run") == {7: True, 8: True}
    again = run(tmp_path / "run", "skip", steps=9, resume=True, dataset=Broken(bad=0))
    assert again.summary["skipped_steps"] == 2


def test_too_many_skipped_steps_in_a_row_stop_it() -> None:
    with pytest.raises(NotFinite, match=f"skipped {MOST_SKIPPED} such steps in a row"):
        run(None, "skip", steps=100, dataset=Broken(bad=2, count=1000))
    trained = run(None, "skip", steps=60, dataset=EveryOther())
    assert trained.summary["skipped_steps"] == 30


class EveryOther(Broken):
    """Every other batch is nan."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.bad, self.count = self.calls + 1, self.calls % 2
        return super().__getitems__(indices)


def test_going_on_never_displaces_the_last_finite_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    trained = run(folder, "go")
    assert trained.summary["loss"] is None
    assert trained.summary["reasons"]["loss"] == "the last step's is nan, the first that was not finite is step 5"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("step 5: the loss is nan; ")
    assert line.endswith("the training goes on (--on-nan go), further ones are not told")
    assert checkpoints(folder) == {4: True, 7: False, 8: False}
    gone_on = run(folder, "go", steps=10, resume=True, dataset=Broken(bad=0))
    assert gone_on.steps[0].step == 9
    assert "resuming from step-00000008, which is not finite; the last finite one is step-00000004" in (
        capfd.readouterr().err
    )
    assert checkpoints(folder) == {4: True, 9: False, 10: False}
    export_safetensors(folder, tmp_path / "weights.safetensors")
    resumed = run(folder, "stop", resume=True, dataset=Broken(bad=0))
    assert [step.step for step in resumed.steps] == [5, 6, 7, 8]
    assert math.isfinite(resumed.summary["loss"])


def test_without_a_finite_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    run(tmp_path, "go", dataset=Broken(bad=1, count=1000))
    with pytest.raises(CheckpointError, match="is not finite: its weights or its loss are inf or nan"):
        run(tmp_path, "stop", resume=True, dataset=Broken(bad=0))


def test_weights_that_an_update_made_infinite_are_no_finite_checkpoint(tmp_path: Path) -> None:
    """A finite gradient and a rate that is too large: what is left of it is not saved over what was."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.inf if step == 4 else 0.01)

    with pytest.raises(NotFinite, match=r"step 6: .* is parameter 0.weight, before the step, on worker 0") as stopped:
        run(tmp_path, "stop", optimizer=optimizer, schedule=schedule, dataset=Broken(bad=0))
    assert "step-00000004" in str(stopped.value)
    assert checkpoints(tmp_path) == {3: True, 4: True, 5: False}  # the protected one is not among those to keep


def judged(judge: Callable[..., bool], **changes: Any) -> Program:
    program = Program.build(workload(**changes), Strategy.parse("single,microbatches=2"))
    program.ask_before_update(judge)
    return program


def test_a_norm_that_overflows_is_told_as_one() -> None:
    program = Program.build(workload(loss=lambda output, batch: output.mean() * 1e25, dataset=Broken(0)), Strategy())
    guard = Guard(program, "stop", print)
    with pytest.raises(NotFinite, match=r"no single gradient is inf or nan, their squared norm overflows"):
        program.step([each[:BATCH] for each in samples()])
    assert guard.first == 1


def test_a_weight_of_nan_is_not_taken_for_nothing() -> None:
    program = Program.build(workload(weight=lambda batch: batch[0].sum() * math.nan, dataset=Broken(0)), Strategy())
    Guard(program, "stop", print)
    with pytest.raises(NotFinite, match=r"the loss is nan; the first that is not finite is the weight of the batch"):
        program.step([each[:BATCH] for each in samples()])


def test_what_cannot_be_told_is_said() -> None:
    """A loss that is nan only when it is first computed."""
    calls = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        calls.append(0)
        return F.cross_entropy(output, batch[1]) + (math.nan if len(calls) == 1 else 0.0)

    program = Program.build(workload(loss=loss, dataset=Broken(0)), Strategy())
    Guard(program, "stop", print)
    with pytest.raises(NotFinite, match=r"which module comes first cannot be told: the same passes gave finite"):
        program.step([each[:BATCH] for each in samples()])


def test_the_search_draws_what_the_step_drew_and_leaves_no_trace() -> None:
    """Random numbers that workers do not share, and buffers, are those of the step when its passes are run again."""
    drawn: list[float] = []
    states: list[Tensor] = []

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append(float(torch.randperm(1000)[0]))
            return x / 0

    def judge(loss: float, square: float, search: Callable[[], Any]) -> bool:
        states.append(torch.get_rng_state())
        fault = search()
        assert fault is not None
        assert (fault.microbatch, fault.what) == (0, "module '0.1'")
        states.append(torch.get_rng_state())
        return False

    program = judged(judge, model=lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(4), Noise()), nn.Linear(4, 3)))
    before = {piece.name: piece.local.clone() for piece in program.pieces()}
    program.step([each[:4] for each in samples()])
    assert drawn[:2] == drawn[2:]
    assert torch.equal(*states)
    for piece in program.pieces():
        assert torch.equal(piece.local, before[piece.name]), piece.name
    assert program.steps == 1


@pytest.mark.parametrize("value", ["sop", "", "Skip"])
def test_an_unknown_policy_is_refused(value: str) -> None:
    with pytest.raises(RequestError, match=f"on_nan={value}: known are stop, skip, go"):
        settle_options(steps=1, on_nan=value)
