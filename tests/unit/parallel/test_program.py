"""A program on one worker: plain PyTorch, with the bookkeeping of every program."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from shardwise.errors import CheckpointError, WorkloadError
from shardwise.parallel.data.blocks import repeated_blocks, steady_modules
from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.program import Program
from shardwise.parallel.state.build_model import aliases_of, persistent_buffers
from shardwise.parallel.state.layout import TensorPiece
from shardwise.splitting.ownership import assign_owners
from shardwise.strategy import Strategy
from shardwise.workload.workload import Evaluation, Workload

torch.manual_seed(0)
DATA = TensorDataset(torch.randn(13, 6), torch.randint(0, 3, (13,)))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def workload(**changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "unit",
        "model": model,
        "dataset": DATA,
        "inputs": lambda batch: batch[0],
        "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        "batch_size": 8,
    }
    return Workload(**{**options, **changes})


def program(strategy: str = "single", **changes: Any) -> Program:
    return Program.build(workload(**changes), Strategy.parse(strategy))


def modules_of(program: Program) -> nn.Sequential:
    """The model that is trained, as `model` makes it."""
    assert isinstance(program.engine, ModuleEngine)
    assert isinstance(program.engine.model, nn.Sequential)
    return program.engine.model


def run(program: Program, epochs: int = 1) -> list[float]:
    return [float(program.step_share(share)) for epoch in range(epochs) for share in program.loader().shares(epoch)]


def test_a_step_is_plain_pytorch() -> None:
    ours = program(clip_norm=0.3, schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    torch.manual_seed(0)
    plain = model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for start in (0, 4, 5):
        batch = DATA[start : start + 8]
        loss = F.cross_entropy(plain(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        assert float(ours.step(batch)) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert ours.gradient_norm is not None
        assert float(ours.gradient_norm) == pytest.approx(float(norm), rel=1e-5)
        gradients = {piece.name: piece.local for piece in ours.gradient_pieces()}
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[f"gradient/{name}"], parameter.grad)
    weights = ours.full_state_dict()
    assert weights is not None
    assert list(weights) == [*dict(plain.named_parameters()), *dict(plain.named_buffers())]
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(weights[name], tensor)
    assert ours.steps == 3
    assert ours.mesh.world is None


def test_microbatches_add_up() -> None:
    def plain() -> nn.Module:
        return nn.Linear(6, 3)

    whole, cut = program(model=plain), program("single,microbatches=4", model=plain)
    assert run(whole) == pytest.approx(run(cut), rel=1e-5)


def test_weighted_loss_is_the_mean_over_the_weight() -> None:
    """A microbatch without weight has a mean over nothing: it counts for nothing, and gives no gradient of NaN."""
    counts = torch.tensor([1.0, 1, 0, 0, 1, 0, 1, 1])
    data = TensorDataset(torch.randn(8, 6), torch.randint(0, 3, (8,)), counts)

    def loss(output: Tensor, batch: Any) -> Tensor:
        result: Tensor = (F.cross_entropy(output, batch[1], reduction="none") * batch[2]).sum() / batch[2].sum()
        return result

    parts: dict[str, Any] = {
        "model": lambda: nn.Linear(6, 3),
        "dataset": data,
        "loss": loss,
        "weight": lambda batch: batch[2].sum(),
        "evaluation": Evaluation(dataset=data, metric="ones", measure=lambda o, b: torch.ones(())),
    }
    whole, cut = program(**parts), program("single,microbatches=4", **parts)
    for _ in range(2):
        assert float(whole.step(data[:])) == pytest.approx(float(cut.step(data[:])), rel=1e-5)
        for a, b in zip(whole.gradient_pieces(), cut.gradient_pieces(), strict=True):
            torch.testing.assert_close(a.local, b.local)
    assert whole.evaluate() == pytest.approx(cut.evaluate(), rel=1e-5)
    nothing = data[2:4]
    assert float(whole.step(nothing)) == 0


def test_evaluation_counts_each_sample_once_and_changes_nothing() -> None:
    seen: list[int] = []

    def measure(output: Tensor, batch: Any) -> Tensor:
        seen.extend(batch[1].tolist())
        result: Tensor = batch[1].double().mean()
        return result

    held_out = TensorDataset(torch.randn(11, 6), torch.arange(11) % 3)
    ours = program(evaluation=Evaluation(dataset=held_out, metric="label", measure=measure, batch_size=4))
    run(ours)
    before = {piece.name: piece.local.clone() for piece in ours.pieces()}
    trained = modules_of(ours)
    batch_norm = trained[1]
    batch_norm.eval()  # a module that is never in training stays so
    result = ours.evaluate()
    assert seen == held_out.tensors[1].tolist()
    assert result["label"] == pytest.approx(held_out.tensors[1].double().mean().item())
    assert trained.training
    assert not batch_norm.training
    for piece in ours.pieces():
        assert torch.equal(piece.local, before[piece.name])
    assert program().evaluate() == {}


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], 0.5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            ],
            [3],
        ),
    ],
    ids=["cosine", "multistep", "onecycle", "lambda", "sequential"],
)
def test_state_goes_through_json(schedule: Callable[..., Any]) -> None:
    first = program(schedule=schedule)
    run(first, 2)
    state = json.loads(json.dumps(first.state()))
    second = program(schedule=schedule)
    second.load_state(state)
    for piece in first.pieces():
        kind, _, rest = piece.name.partition("/")
        if kind == "model":
            target: TensorPiece | None = next(other for other in second.pieces() if other.name == piece.name)
        else:
            parameter, _, key = rest.rpartition("/")
            target = second.optimizer_piece(parameter, key, piece.layout.shape, piece.local.dtype)
        assert target is not None
        target.local.copy_(piece.local)
    assert second.steps == first.steps == 4
    assert run(first, 2) == run(second, 2)
    assert first.optimizer is not None
    assert second.optimizer is not None
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    assert second.state() == first.state()


def test_state_of_another_optimizer_is_refused() -> None:
    def groups(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}], lr=0.1)

    grouped = program(optimizer=groups)
    grouped.load_state(program().state())  # one rate for all of them
    assert grouped.optimizer is not None
    assert [group["lr"] for group in grouped.optimizer.param_groups] == [0.1, 0.1]
    with pytest.raises(CheckpointError, match="2 parameter groups, the workload's optimizer makes 1"):
        program().load_state(program(optimizer=groups).state())


class Counting(torch.optim.Optimizer):
    """Keeps a Python number and a factored moment."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1
            state["rows"] = state.get("rows", 0) + parameter.grad.flatten(1 if parameter.dim() > 1 else 0).sum(-1)
            parameter -= 0.1 * parameter.grad / state["count"]


def test_optimizer_state_of_any_kind() -> None:
    ours = program(optimizer=Counting)
    assert ours.optimizer_piece("nobody", "count", (), torch.float32) is None
    run(ours)
    pieces = {piece.name: piece for piece in ours.pieces()}
    assert "optimizer/0.weight/count" not in pieces
    assert pieces["optimizer/0.weight/rows"].layout.shape == (8,)
    assert ours.state()["optimizer"]["0.weight"] == {"count": 2}
    again = program(optimizer=Counting)
    again.load_state(json.loads(json.dumps(ours.state())))
    count = again.optimizer.state[again.engine.parameters["0.weight"]]["count"]
    assert (type(count), count) == (int, 2)


def test_count_in_a_checkpoint_of_an_earlier_version() -> None:
    """There it is a tensor."""
    ours = program(optimizer=Counting)
    piece = ours.optimizer_piece("0.weight", "count", (), torch.int64)
    assert piece is not None
    piece.local.fill_(7)
    ours.step(DATA[:8])
    assert int(ours.optimizer.state[ours.engine.parameters["0.weight"]]["count"]) == 8


class Reader(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([DATA[index] for index in range(13)])


def test_iterable_dataset() -> None:
    ours = program("single,recompute=full", dataset=Reader())
    assert len(run(ours)) == 2


def test_model_in_evaluation_mode_is_trained() -> None:
    assert modules_of(program(model=lambda: model().eval())).training


USED = program()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda: modules_of(USED)}, "must build a new one at each call"),
        ({"model": lambda: 3}, "must build an nn.Module, not int"),
        ({"model": lambda: nn.ReLU()}, "no parameter to train"),
        ({"model": lambda: nn.LazyLinear(3)}, "parameter weight of workload 'unit' has no shape yet"),
        ({"loss": lambda output, batch: output.sum(1)}, r"shape \(8,\): must be a scalar"),
        ({"weight": lambda batch: batch[1]}, r"weight of workload 'unit' has shape \(8,\)"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message) as info:
        program(**changes).step(DATA[:8])
    assert "\n" not in str(info.value)


def test_unused_parameters_are_passed_over() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never = nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.used(x)
            return output

    ours = program(model=Extra)
    before = ours.engine.parameters["never.weight"].detach().clone()
    run(ours)
    assert torch.equal(ours.engine.parameters["never.weight"], before)


@dataclass
class Output:
    logits: Tensor
    extra: tuple[Tensor, str]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_outputs_of_any_kind_reach_the_loss_in_float32(kind: str, precision: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.plain(x)
            return {"tuple": (y, 1), "dict": {"logits": y}, "dataclass": Output(y, (y, "name"))}[kind]

    def loss(output: Any, batch: Any) -> Tensor:
        logits = {"tuple": lambda: output[0], "dict": lambda: output["logits"], "dataclass": lambda: output.logits}[
            kind
        ]()
        assert logits.dtype == torch.float32
        return F.cross_entropy(logits, batch[1])

    losses = run(program(model=Wrapped, loss=loss, precision=precision, weight=lambda batch: len(batch[1])))
    assert losses == pytest.approx(run(program(model=lambda: nn.Linear(6, 3))), rel=0.02)


def test_names_of_tied_parameters_and_buffers() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "n": nn.BatchNorm1d(3)})
    tied["b"].weight = tied["a"].weight
    tied["m"] = tied["n"]
    tied["n"].register_buffer("scratch", torch.zeros(1), persistent=False)
    assert aliases_of(tied)["b.weight"] == "a.weight"
    assert aliases_of(tied)["m.running_mean"] == "n.running_mean"
    assert list(persistent_buffers(tied)) == ["n.running_mean", "n.running_var", "n.num_batches_tracked"]
    ours = program(model=lambda: Tied())
    assert "back.weight" not in ours.engine.parameters
    weights = ours.full_state_dict()
    assert weights is not None
    assert set(weights) == set(Tied().state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.there, self.back, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.back(self.there(x)))
        return output


def test_dealing_is_even() -> None:
    owners = assign_owners({"embedding": 100, "a": 50, "b": 40, "c": 10, "empty": 0}, 2)
    assert owners["embedding"] == 0
    assert owners["a"] == owners["b"] == owners["c"] == 1
    assert set(assign_owners({"only": 3}, 4).values()) == {0}


class Layer(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
        self.mlp = nn.ModuleDict({"up": nn.Linear(size, 4 * size), "down": nn.Linear(4 * size, size)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        output: Tensor = x + self.mlp["down"](self.mlp["up"](x).relu())
        return output


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Stages(nn.Sequential):
    pass


class Routed(nn.Module):
    """Only one of the experts is called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.experts[int(x[0, 0] > 0)](x)
        return output


class Shared(nn.Module):
    """The first layer's weight is tied to the head's, the second is called twice."""

    def __init__(self) -> None:
        super().__init__()
        layers = [Layer() for _ in range(4)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(4, 4)
        first = layers[0].attention[0]
        assert isinstance(first, nn.Linear)
        self.head.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        for number in (0, 1, 1, 2, 3):
            x = self.layers[number](x)
        output: Tensor = self.head(x)
        return output


def blocks(model: nn.Module) -> list[str]:
    inputs = [torch.ones(2, 4), torch.ones(1, 4), -torch.ones(1, 4)]
    called = steady_modules(model, [partial(model, x) for x in inputs])
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in repeated_blocks(model, called)]


def test_blocks_are_found_by_structure() -> None:
    layers = [f"layers.{number}" for number in range(3)]
    assert blocks(Tower()) == layers
    # two towers of one class, stages of one class: the layers inside them
    assert blocks(nn.Sequential(Tower(), Tower())) == [f"{tower}.{layer}" for tower in (0, 1) for layer in layers]
    staged = nn.Sequential(*(Stages(Layer(), Layer()) for _ in range(2)))
    assert blocks(staged) == ["0.0", "0.1", "1.0", "1.1"]
    # linear layers where there is nothing larger; nothing where nothing repeats, or it holds next to nothing
    assert blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == ["0", "2"]
    assert blocks(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) == []
    # what some samples do not call, or what others use too, is no block
    assert blocks(nn.Sequential(Routed(), Routed())) == ["0", "1"]
    assert blocks(Routed()) == []
    assert "layers.0" not in blocks(Shared())


def test_modules_that_write_to_their_input_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Sequential(nn.Hardtanh(inplace=True)), nn.ReLU())
    steady = steady_modules(model, [lambda: model(torch.ones(1, 4))])
    assert steady == {model, model[0], model[3]}


def test_notes_say_what_was_not_possible() -> None:
    ours = program("single,recompute=full", model=lambda: nn.Linear(6, 3))
    assert ours.engine.notes == (
        "no repeated blocks in the model: recompute=full treats it as one, which saves less memory",
    )


def test_clipping_at_infinity_only_measures() -> None:
    ours, plain = program(clip_norm=math.inf), program()
    assert run(ours) == run(plain)
    assert ours.gradient_norm is not None
    assert ours.gradient_norm > 0


def test_workload_is_left_alone() -> None:
    spec = workload()
    Program.build(spec, Strategy())
    assert replace(spec) == spec
