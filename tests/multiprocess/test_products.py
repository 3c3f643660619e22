"""Products of the axes train what one process trains, and go on where any other strategy stopped, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from breaking import Breaking, assert_noticed
from equality import assert_equal, check, merge, reference, train, train_part
from models import ALL, ODDITIES, WORKLOADS, first
from pool import Pools
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from traces import remembered

from shardwise.parallel.data import gradient_reducer
from shardwise.parallel.graph.parameters import LocalStages
from shardwise.parallel.operators.graph_operators import GraphOperators
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

TOLERANCE = 1e-10
PRODUCTS = (
    "dp=2,tp=2",
    "dp=2,pp=2",
    "dp=2,pp=2,schedule=zero-bubble",
    "tp=2,pp=2",
    "tp=2,pp=2,sp=1,schedule=interleaved",
    "fsdp=2,tp=2,zero=1",
    "fsdp=2,tp=2,zero=2",
    "fsdp=2,tp=2",
    "fsdp=2,tp=2,sp=1,recompute=full",
    "fsdp=2,tp=2,sp=1",
    "tp=2,pp=2,sp=1",
    "fsdp=2,tp=2,microbatches=2",
    "fsdp=2,pp=2,zero=1",
    "fsdp=2,pp=2,zero=2",
    "fsdp=2,pp=2",
    "dp=2,pp=2,outermost=pp",
    "fsdp=2,pp=2,schedule=zero-bubble,outermost=pp",
    "fsdp=2,pp=2,schedule=gpipe",
    "fsdp=2,pp=2,schedule=interleaved",
    "fsdp=2,pp=2,schedule=zero-bubble",
    "fsdp=2,pp=2,schedule=zero-bubble,recompute=full",
    "fsdp=2,tp=2,sp=1,recompute=1/2",
    "fsdp=2,pp=2,schedule=interleaved,recompute=selective",
    "dp=2,tp=2,sp=1,recompute=selective",
    "fsdp=2,tp=2,offload=1",
    "fsdp=2,pp=2,offload=1",
)


class Wide(nn.Module):
    """Four layers of half a MiB each in float64, so that a bucket of 1 MiB does not hold all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.Tanh())))
        self.last = nn.Linear(256, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.layers(x))
        return found


def wide() -> Workload:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(16, 256, generator=generator, dtype=torch.float64), torch.arange(16) % 3)
    return Workload(
        name="wide",
        model=lambda: Wide().double(),
        dataset=data,
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2,zero=1,microbatches=2", "dp=2,tp=2", "dp=2,pp=2"])
def test_several_buckets(workers: Pools, strategy: str) -> None:
    for bucket in ("", ",bucket=1"):
        check(workers, wide, strategy + bucket)


@pytest.mark.parametrize("strategy", PRODUCTS)
def test_every_product(workers: Pools, strategy: str) -> None:
    check(workers, WORKLOADS["tied"], strategy)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("resnet", "dp=2,tp=2"),
        ("resnet", "dp=2,pp=2"),
        ("resnet", "fsdp=2,tp=2"),
        ("unet", "tp=2,pp=2"),
        ("unet", "fsdp=2,pp=2"),
        ("regression", "fsdp=2,tp=2"),
        ("low-rank", "fsdp=2,pp=2"),
        ("other-in-evaluation", "tp=2,pp=2"),
        ("other-in-evaluation", "fsdp=2,tp=2"),
    ],
)
def test_other_models(workers: Pools, name: str, strategy: str) -> None:
    check(workers, ALL[name], strategy)


@pytest.mark.parametrize("strategy", ["fsdp=2,tp=2", "fsdp=2,pp=2,schedule=zero-bubble"])
def test_one_layer_in_all_stages(workers: Pools, strategy: str) -> None:
    check(workers, ODDITIES["shared"], strategy)


@pytest.mark.parametrize("strategy", ["dp=2,tp=2", "dp=2,pp=2", "fsdp=2,tp=2", "fsdp=2,pp=2"])
@pytest.mark.parametrize(("name", "samples"), [("smoothed", 13), ("perceptron", 9)])
def test_small_last_batches(workers: Pools, name: str, samples: int, strategy: str) -> None:
    # of 9 samples the second batch has one: there are more replicas than samples
    check(workers, partial(first, name, samples), strategy)


def test_half_precision(workers: Pools) -> None:
    whole = WORKLOADS["tied"]()

    def single() -> Workload:
        return replace(whole, model=lambda: whole.model().float(), optimizer=partial(torch.optim.SGD, lr=0.1))

    for strategy in ("tp=2,pp=2,precision=bf16", "fsdp=2,tp=2,precision=bf16"):
        result = train(workers, single, strategy)
        assert_equal(result, reference(workers, single, strategy), 0.05)
        assert {tensor.dtype for tensor in result.state.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["dp=2,tp=2,pp=2", "fsdp=2,tp=2,pp=2,sp=1,schedule=zero-bubble"])
def test_three_axes(workers: Pools, strategy: str) -> None:
    factory = WORKLOADS["tied"]
    # eight processes that start at once need their time
    parts = workers(8, train_part, factory, strategy, 3, False, None, timeout=600)
    assert_equal(merge(parts), reference(workers, factory, strategy), TOLERANCE)


def test_a_buffer_that_follows_the_samples_is_said(workers: Pools) -> None:
    # replicas see other samples: they take the first one's, as under DDP, and stay equal
    for strategy in ("dp=2,tp=2", "fsdp=2,tp=2"):
        result = train(workers, ODDITIES["updates-buffer"], strategy)
        assert any("buffer seen follows the samples" in note for note in result.notes), result.notes


# ---- resume ---------------------------------------------------------------------------------------------------------


def go_on(strategy: str, folder: Path | None, until: int) -> list[float]:
    """Losses of the steps up to `until`; from the newest checkpoint on where there is one, with one at the end."""
    with remembered(WORKLOADS["tied"]):
        program = Program.build(WORKLOADS["tied"](), Strategy.parse(strategy))
    checkpoints = None if folder is None else Checkpoints(folder)
    path = None if checkpoints is None else checkpoints.latest()
    if checkpoints is not None and path is not None:
        assert checkpoints.load(program, path) == {"batch": program.steps}
    shares = program.loader().shares(0, start=program.steps)
    losses = [float(program.step_share(next(shares))) for _ in range(until - program.steps)]
    if checkpoints is not None:
        checkpoints.save(program, {"batch": program.steps})
        checkpoints.wait()
    return losses


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp=2", "tp=2"),
        ("tp=2", "single"),
        ("pp=2", "fsdp=2"),
        ("tp=2,pp=2", "dp=2"),
        ("fsdp=2,tp=2", "pp=2,schedule=zero-bubble"),
        ("fsdp=2,pp=2,zero=1", "tp=2,sp=1"),
    ],
)
def test_resume(workers: Pools, tmp_path: Path, before: str, after: str) -> None:
    expected = go_on("single", None, 3)
    losses = workers(Strategy.parse(before).workers, go_on, before, tmp_path, 2)[0]
    losses += workers(Strategy.parse(after).workers, go_on, after, tmp_path, 3)[0]
    assert losses == pytest.approx(expected, rel=1e-9)
    export_safetensors(tmp_path, tmp_path / "model.safetensors")
    model = WORKLOADS["tied"]().model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    state = reference(workers, WORKLOADS["tied"], "single").state
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.detach(), state[name], rtol=1e-8, atol=1e-10, msg=name)


# ---- broken on purpose ----------------------------------------------------------------------------------------------


def normalised_alone() -> Any:
    normalise = GraphOperators.batch_norm

    def alone(self: Any, *args: Any) -> Any:
        self.replicas = None
        return normalise(self, *args)

    return mock.patch.object(GraphOperators, "batch_norm", alone)


def scaled_wrongly() -> Any:
    scatter = gradient_reducer._scatter
    return mock.patch.object(gradient_reducer, "_scatter", lambda flat, parameters: scatter(flat / 2, parameters))


def averaged_wrongly() -> Any:
    reduced = LocalStages.reduce

    def twice(self: Any, summed: Any) -> None:
        reduced(self, summed)
        for module in self.stages.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 2

    return mock.patch.object(LocalStages, "reduce", twice)


@pytest.mark.parametrize(
    ("name", "strategy", "breaking"),
    [
        ("resnet", "dp=2,tp=2", normalised_alone),
        ("odd-vocabulary", "dp=2,pp=2", scaled_wrongly),
        ("odd-vocabulary", "fsdp=2,tp=2", averaged_wrongly),
        ("separate", "fsdp=2,tp=2", averaged_wrongly),  # clipping hides it from all but the norm
    ],
)
def test_comparison_notices(workers: Pools, name: str, strategy: str, breaking: Breaking) -> None:
    assert_noticed(workers, ALL[name], strategy, breaking)
