"""Local steps: replicas equal plain models that torch alone trains one after the other, and averages."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import adam, make, points
from pool import Pools
from safetensors.torch import load_file
from torch import Tensor, nn
from traces import remembered

from shardwise.parallel.data import local_steps
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.run.verification.first_step import prove_first_step
from shardwise.splitting.local_steps import averaged_after, cut_fragments
from shardwise.strategy import Strategy
from shardwise.workload.data import cut_batch
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.workload import Workload

STEPS, SEED = 6, 3


def layers(norm: bool = False) -> nn.Sequential:
    found = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    return found.insert(1, nn.BatchNorm1d(16)) if norm else found


def workload(norm: bool = False, **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "optimizer": adam,
        "seed": SEED,
        "evaluation": Evaluation(
            dataset=points(10), metric="size", measure=lambda output, batch: output.square().mean(), name="held"
        ),
    }
    options = {"dataset": points(8 * STEPS), **options, **changes}
    return make(partial(layers, norm), **options)


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def clipped() -> Workload:
    return workload(clip_norm=0.3)


def normed() -> Workload:
    return workload(norm=True)


def weighted() -> Workload:
    """The loss averages over something else than samples."""

    def loss(output: Tensor, batch: Any) -> Tensor:
        weights = 1.0 + batch[1]
        mean: Tensor = (F.cross_entropy(output, batch[1], reduction="none") * weights).sum() / weights.sum()
        return mean

    return workload(weight=lambda batch: (1.0 + batch[1]).sum(), loss=loss)


class Alone:
    """Copies of a model, each trained on its part of every batch by plain PyTorch, and averaged by the book."""

    def __init__(self, made: Workload, strategy: Strategy) -> None:
        self.workload, self.strategy = made, strategy
        torch.manual_seed(made.seed)
        model = made.model()
        self.models = [copy.deepcopy(model) for _ in range(strategy.dp)]
        self.optimizers = [made.optimizer(list(each.parameters())) for each in self.models]
        self.last = copy.deepcopy(model)
        self.outer = torch.optim.SGD(self.last.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        names = [name for name, _ in model.named_parameters()]
        cut = cut_fragments([each.numel() for each in model.parameters()], strategy.fragments)
        self.fragments = [[names[index] for index in each] for each in cut]
        self.weights = [[0.0] * strategy.dp for _ in cut]
        self.arriving: list[tuple[int, int, dict[str, Tensor], list[dict[str, Tensor]]]] = []
        self.losses: list[float] = []
        self.steps = 0

    def step(self, batch: list[Tensor]) -> None:
        strategy = self.strategy.for_batch(self.workload.batch_size)
        cells = cut_batch(len(batch[0]), strategy.parts, strategy.microbatches, uniform=strategy.pp > 1)
        columns = [range(first, first + strategy.fsdp) for first in range(0, strategy.replicas, strategy.fsdp)]
        taken = [[sample for row in cells for column in each for sample in row[column]] for each in columns]
        losses, weights = [], []
        for model, optimizer, rows in zip(self.models, self.optimizers, taken, strict=True):
            data = [tensor[rows] for tensor in batch]
            optimizer.zero_grad()
            loss = self.workload.loss(model(data[0]), data)
            loss.backward()
            if self.workload.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.workload.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            weights.append(len(rows) if self.workload.weight is None else float(self.workload.weight(data)))
        self.losses.append(sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights))
        for each in self.weights:
            each[:] = [before + weight for before, weight in zip(each, weights, strict=True)]
        self.steps += 1
        self.merge()
        number = averaged_after(self.steps, self.strategy.local, self.strategy.fragments)
        if number is not None:
            self.send(number)
            self.merge()

    def send(self, number: int) -> None:
        names = set(self.fragments[number])
        if number == 0:
            names |= {name for name, each in self.models[0].named_buffers() if each.is_floating_point()}
        sent = [{n: t.detach().clone() for n, t in each.state_dict().items() if n in names} for each in self.models]
        total = sum(self.weights[number])
        mean = {n: sum(each[n] * w / total for each, w in zip(sent, self.weights[number], strict=True)) for n in names}
        self.weights[number] = [0.0] * len(self.models)
        self.arriving.append((self.steps + self.strategy.delay, number, mean, sent))

    @torch.no_grad()
    def merge(self) -> None:
        for _, number, mean, sent in [each for each in self.arriving if each[0] <= self.steps]:
            parameters = dict(self.last.named_parameters())
            if self.strategy.outer == "nesterov":
                for name, parameter in parameters.items():
                    parameter.grad = parameter - mean[name] if name in self.fragments[number] else None
                self.outer.step()
                mean = {**mean, **{name: parameters[name].clone() for name in self.fragments[number]}}
            for model, own in zip(self.models, sent, strict=True):
                state = model.state_dict()
                for name, value in mean.items():
                    state[name].copy_(value + state[name] - own[name])
        self.arriving = [each for each in self.arriving if each[0] > self.steps]

    def mean(self) -> dict[str, Tensor]:
        states = [each.state_dict() for each in self.models]
        return {name: _mean([state[name] for state in states]) for name in states[0]}


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0) if values[0].is_floating_point() else values[0]


def by_hand(made: Workload, strategy: str, steps: int = STEPS) -> Alone:
    found = Alone(made, Strategy.parse(strategy))
    for number, share in enumerate(Program.build(made, Strategy()).loader().shares(0)):
        if number < steps:
            found.step(share.microbatches[0].data)
    return found


def run(factory: Any, strategy: str, steps: int = STEPS, folder: Path | None = None) -> dict[str, Any]:
    """Losses, the mean of parameters and buffers over the replicas, and this replica's own, by name."""
    with remembered(factory):
        return _run(factory, strategy, steps, folder)


def _run(factory: Any, strategy: str, steps: int, folder: Path | None) -> dict[str, Any]:
    program = Program.build(factory(), Strategy.parse(strategy))
    checkpoints = None if folder is None else Checkpoints(folder)
    path = None if checkpoints is None else checkpoints.latest()
    if checkpoints is not None and path is not None:
        checkpoints.load(program, path)
    assert prove_first_step(program).proved
    losses = []
    for share in program.loader().shares(0, program.steps):
        losses.append(float(program.step_share(share)))
        if program.steps == steps:
            break
    scores = program.evaluate()
    if checkpoints is not None:
        checkpoints.save(program, {"batch": program.steps})
        checkpoints.wait()
    with program.at_means():
        mean = program.full_state_dict()
    return {"losses": losses, "mean": mean, "scores": scores, "notes": program.notes, "norm": program.gradient_norm}


def assert_close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance / 100, msg=partial("{}: {}".format, name)
        )


STRATEGIES = ("dp=2", "dp=4", "dp=2,fsdp=2", "dp=2,fsdp=2,zero=1", "dp=2,tp=2", "dp=2,pp=2")


@pytest.mark.parametrize("option", ["local=2", "local=3,outer=nesterov", "local=4,fragments=2,delay=1,outer=nesterov"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replicas_equal_models_trained_one_after_the_other(workers: Pools, strategy: str, option: str) -> None:
    expected = by_hand(workload(), f"{strategy},{option}")
    found = workers(Strategy.parse(strategy).workers, run, workload, f"{strategy},{option}")
    for each in found:
        assert each["losses"] == pytest.approx(expected.losses, rel=1e-9)
    assert_close(found[0]["mean"], expected.mean())


@pytest.mark.parametrize("factory", [clipped, normed, weighted])
@pytest.mark.parametrize("strategy", ["dp=2,local=2", "dp=2,local=3,delay=2", "dp=2,fsdp=2,local=2,outer=nesterov"])
def test_clipping_batch_norm_and_weights_are_those_of_each_replica(workers: Pools, factory: Any, strategy: str) -> None:
    expected = by_hand(factory(), strategy)
    found = workers(Strategy.parse(strategy).workers, run, factory, strategy)
    assert found[0]["losses"] == pytest.approx(expected.losses, rel=1e-9)
    assert_close(found[0]["mean"], expected.mean())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", [plain_sgd, momentum])
def test_one_local_step_of_sgd_is_data_parallelism(workers: Pools, strategy: str, optimizer: Any) -> None:
    factory = partial(workload, optimizer=optimizer)
    found = workers(Strategy.parse(strategy).workers, run, factory, f"{strategy},local=1")
    expected = run(factory, "single")
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    assert_close(found[0]["mean"], expected["mean"])
    for each in found:
        assert each["scores"] == pytest.approx(expected["scores"], rel=1e-9)


def test_one_local_step_of_adam_is_another(workers: Pools) -> None:
    found, expected = workers(2, run, workload, "dp=2,local=1"), run(workload, "single")
    with pytest.raises(AssertionError):
        assert_close(found[0]["mean"], expected["mean"], 1e-6)


def uneven(optimizer: Any) -> Workload:
    """Weights of the parts of a batch differ, and the last batch has one sample, which one replica alone trains on."""
    return workload(optimizer=optimizer, dataset=points(8 * (STEPS - 1) + 1))


@pytest.mark.parametrize("strategy", ["dp=2,local=1", "dp=4,local=1", "dp=2,pp=2,local=1", "dp=2,shares=3:1,local=1"])
def test_a_replica_counts_by_the_samples_that_it_has_trained_on(workers: Pools, strategy: str) -> None:
    factory = partial(uneven, plain_sgd)
    found, expected = workers(Strategy.parse(strategy).workers, run, factory, strategy), run(factory, "single")
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    assert_close(found[0]["mean"], expected["mean"])


def same_samples() -> Workload:
    """Every sample is the same one, so that replicas do the same."""
    x, y = points(1).tensors
    return workload(dataset=torch.utils.data.TensorDataset(x.repeat(8 * STEPS, 1), y.repeat(8 * STEPS)))


@pytest.mark.parametrize("option", ["local=2", "local=3,delay=2", "local=4,fragments=2,delay=3"])
def test_averages_of_equal_replicas_change_nothing(workers: Pools, option: str) -> None:
    found, expected = workers(2, run, same_samples, f"dp=2,{option}"), run(same_samples, "single")
    assert_close(found[0]["mean"], expected["mean"])


def average_without_momentum(strategy: str) -> dict[str, Any]:
    """A run whose outer optimizer forgets its momentum."""
    with mock.patch.object(local_steps, "MOMENTUM", 0.0):
        return run(workload, strategy)


def test_a_wrong_outer_step_is_noticed(workers: Pools) -> None:
    strategy = "dp=2,local=2,outer=nesterov"
    found = workers(2, average_without_momentum, strategy)
    with pytest.raises(AssertionError):
        assert_close(found[0]["mean"], by_hand(workload(), strategy).mean(), 1e-3)


@pytest.mark.parametrize(
    "strategy",
    ["dp=2,local=4", "dp=2,local=4,outer=nesterov", "dp=2,tp=2,local=4,outer=nesterov", "dp=2,local=6,fragments=2"],
)
def test_a_run_goes_on_exactly_from_between_two_averages(workers: Pools, tmp_path: Path, strategy: str) -> None:
    count = Strategy.parse(strategy).workers
    expected = workers(count, run, workload, strategy)
    workers(count, run, workload, strategy, 3, tmp_path)
    found = workers(count, run, workload, strategy, STEPS, tmp_path)
    assert found[0]["losses"] == expected[0]["losses"][3:]
    assert_close(found[0]["mean"], expected[0]["mean"], 1e-12)
    export_safetensors(tmp_path, tmp_path / "out")
    assert_close(load_file(tmp_path / "out"), expected[0]["mean"], 1e-12)


@pytest.mark.parametrize("after", ["single", "dp=2", "fsdp=2", "dp=4,local=2", "dp=2,tp=2", "tp=2"])
def test_other_strategies_and_workers_that_join_go_on_from_the_mean(workers: Pools, tmp_path: Path, after: str) -> None:
    before = workers(2, run, workload, "dp=2,local=4,outer=nesterov", 3, tmp_path)
    found = workers(Strategy.parse(after).workers, begun, after, tmp_path)
    assert_close(found[0][0], before[0]["mean"], 1e-12)
    for _, own, notes in found:
        assert all(torch.equal(value, before[0]["mean"][name]) for name, value in own.items())
        assert any("2 replicas that took local steps" in note for note in notes)
        assert any("momentum of the outer optimizer" in note for note in notes)


def begun(strategy: str, folder: Path) -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    """Weights after loading: gathered, and those that this worker holds whole."""
    with remembered(workload):
        program, checkpoints = Program.build(workload(), Strategy.parse(strategy)), Checkpoints(folder)
    path = checkpoints.latest()
    assert path is not None
    checkpoints.load(program, path)
    pieces = [each for each in program.pieces() if each.name.startswith("model/")]
    own = {p.name.removeprefix("model/"): p.local.clone() for p in pieces if p.layout.local_shape == p.layout.shape}
    return program.full_state_dict(), own, program.notes


def test_an_outer_optimizer_begins_where_a_run_without_one_ended(workers: Pools, tmp_path: Path) -> None:
    workers(2, run, workload, "dp=2", 3, tmp_path)
    found = workers(2, run, workload, "dp=2,local=3,outer=nesterov", STEPS, tmp_path)
    assert any("begins here" in note for note in found[0]["notes"])


def test_the_proof_refuses_gradients_that_are_no_mean(workers: Pools) -> None:
    assert workers(2, refused, "dp=2,local=4") == ["the gradient of"] * 2


def refused(strategy: str) -> str:
    from shardwise.errors import NotProved

    program = Program.build(workload(), Strategy.parse(strategy))
    right = local_steps.LocalSteps._factor
    wrong = mock.patch.object(local_steps.LocalSteps, "_factor", lambda self, *weights: right(self, *weights) * 1.1)
    try:
        with wrong:
            prove_first_step(program)
    except NotProved as error:
        return "the gradient of" if "the gradient of" in str(error) else str(error)
    return "proved"


def test_dropout_is_that_of_the_samples(workers: Pools) -> None:
    """Plain SGD that is averaged after each step shows the masks of one process."""

    def factory() -> Workload:
        return make(
            lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Linear(16, 4)),
            points(8 * STEPS),
            optimizer=plain_sgd,
        )

    found, expected = workers(2, run, factory, "dp=2,local=1"), run(factory, "single")
    assert_close(found[0]["mean"], expected["mean"])


def averaged_weights() -> Workload:
    return workload(average=0.5, optimizer=plain_sgd)


def test_a_moving_average_is_the_mean_of_those_of_the_replicas(workers: Pools) -> None:
    found, expected = workers(2, run, averaged_weights, "dp=2,local=1"), run(averaged_weights, "single")
    for each in found:
        assert each["scores"] == pytest.approx(expected["scores"], rel=1e-9)


def accumulated(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def test_microbatches_accumulate_inside_a_local_step(workers: Pools) -> None:
    factory = partial(workload, loss=accumulated)
    expected = by_hand(factory(), "dp=2,local=2")
    ordered = workers(2, run, factory, "dp=2,local=2,microbatches=1")
    assert_close(ordered[0]["mean"], expected.mean())
    found = workers(2, run, factory, "dp=2,local=2,microbatches=2")
    assert all(torch.isfinite(value).all() for value in found[0]["mean"].values())
