"""A training starts from weights in a file, with a new head, frozen parts and a teacher, under every strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pools
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise import Strategy, WarmStart, Workload
from shardwise.commands.request import check
from shardwise.errors import WorkloadError
from shardwise.parallel.program import Program
from shardwise.parallel.state.build_model import plain_model
from shardwise.predict.dry_run.dry_run import dry_run
from shardwise.predict.profile.profiler import profile
from shardwise.run.verification import verify
from shardwise.workload.source import Source


class Net(nn.Module):
    """Blocks, the first of which is frozen, and a head with a tied weight."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, classes)
        self.embed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.blocks(self.embed(x))))
        return output


def workload(weights: Any, classes: int = 4, **fields: Any) -> Workload:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))
    base = Workload(
        name="warm",
        model=lambda: Net(classes),
        dataset=data,
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        weights=weights,
    )
    return replace(base, **fields)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(9)
    path = tmp_path_factory.mktemp("warm") / "start.safetensors"
    state = {
        name: tensor + 0.5 if tensor.is_floating_point() else tensor for name, tensor in Net().state_dict().items()
    }
    save_file(state, path)
    return path


def state_of(workload: Workload, strategy: str) -> dict[str, Tensor] | None:
    return Program.build(workload, Strategy.parse(strategy)).full_state_dict()


@pytest.mark.parametrize("strategy", ["single", "fsdp=2", "tp=2"])
def test_every_strategy_starts_from_the_weights(strategy: str, stored: Path, workers: Pools) -> None:
    from safetensors.torch import load_file

    state = workers(Strategy.parse(strategy).workers, state_of, workload(stored), strategy)[0]
    for name, tensor in load_file(stored).items():
        assert torch.equal(state[name], tensor), name


def test_a_new_head_keeps_its_own_values(stored: Path) -> None:
    allowing = WarmStart(path=stored, allow_missing=("head.*",))
    model = plain_model(workload(allowing, classes=7))
    torch.manual_seed(0)
    fresh = Net(7)
    assert torch.equal(model.get_parameter("head.weight"), fresh.head.weight)
    assert not torch.equal(model.get_parameter("blocks.0.0.weight"), fresh.get_parameter("blocks.0.0.weight"))


def test_a_part_of_the_model_is_started(stored: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.extra = Net(), nn.Linear(4, 2)

    start = WarmStart(path=stored, prefix="encoder.", allow_missing=("extra.*",))
    model = plain_model(workload(start, model=Wrapped))
    torch.testing.assert_close(model.get_buffer("encoder.norm.running_mean"), torch.full((16,), 0.5))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("norm.running_mean"), "norm.running_mean of the model is not in the file"),
        (lambda state: state.update(extra=torch.ones(1)), "extra in the file is not in the model"),
        (
            lambda state: state.update({"head.bias": torch.ones(5)}),
            r"head.bias is stored with shape \(5,\), the model has \(4,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_workers_start(change: Any, match: str, tmp_path: Path) -> None:
    state = dict(Net().state_dict())
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(WorkloadError, match=match) as raised:
        check(workload(tmp_path / "other.safetensors"), Strategy.parse("dp=2"))
    assert "\n" not in str(raised.value)
    assert "allow_missing" in str(raised.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    for path, match in (
        (tmp_path / "text.safetensors", "cannot be read as a safetensors file"),
        (tmp_path / "missing.safetensors", "there is no such file"),
        (tmp_path, "holds no|has no model.safetensors"),
    ):
        with pytest.raises(WorkloadError, match=match):
            check(workload(path), Strategy())
    with pytest.raises(WorkloadError, match="must be a tuple of patterns"):
        WarmStart(path=tmp_path, allow_missing="head.*")  # type: ignore[arg-type]


def distilled(stored: Path) -> Workload:
    torch.manual_seed(4)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double()

    def loss(output: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            aim = teacher(batch[0].double()).softmax(-1)
        return F.kl_div(output.log_softmax(-1), aim.to(output.dtype), reduction="batchmean")

    return workload(stored, loss=loss)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_a_teacher_outside_of_the_model(strategy: str, stored: Path, workers: Pools, tmp_path: Path) -> None:
    source = Source(workload=distilled(stored))
    chosen = Strategy.parse(strategy).for_batch(8)
    alone = Strategy(microbatches=chosen.microbatches)
    trial = verify.StrategyTrial(source=source, strategy=alone, steps=2, float64=True, folder=str(tmp_path))
    workers(1, verify.record, trial)
    proof = workers(2, verify.compare, replace(trial, strategy=chosen))[0]
    assert proof.passed, proof


@pytest.mark.parametrize("strategy", ["fsdp=2", "tp=2"])
def test_predictions_need_no_values(strategy: str, stored: Path) -> None:
    warm, chosen = workload(stored), Strategy.parse(strategy)
    check(warm, chosen)
    found, plain = (dry_run(each, chosen) for each in (warm, workload(None)))
    assert not any("run with values" in note for note in found.notes)
    assert found.memory == plain.memory
    assert profile(warm, microbatch=4) == profile(workload(None), microbatch=4)
