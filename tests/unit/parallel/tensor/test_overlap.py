"""Collectives of a backward pass run beside the gradients of weights, and all gradients are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from steps import local
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwise.parallel.pipeline.cut_points import find_cut_points
from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.overlap import late, linear, overlap, overlapping
from shardwise.parallel.tensor.partitioner import LocalGraph

WIDTH, SHAPE = 4, (2, 6, 4)
Log = list[str]


@dataclass
class Handle:
    """Handle of a collective that logs when it is waited for."""

    log: Log
    name: str

    def wait(self) -> None:
        self.log.append(f"wait for {self.name}")


class LoggedExchange(Exchange):
    """Exchange of one worker, or of several with equal values, that logs when collectives start and end."""

    def __init__(self, log: Log, ranks: int = 1) -> None:
        super().__init__(None, 0, ranks)
        self.log = log

    def started(self, name: str, later: bool) -> Handle:
        self.log.append(f"{name} {'later' if later else 'now'}")
        return Handle(self.log, name)

    def _all_reduce(self, total: Tensor, op: Any, *, later: bool = False) -> Any:
        return self.started("sum", later)

    def _all_gather(self, parts: list[Tensor], x: Tensor, *, later: bool = False) -> Any:
        for part in parts:
            part.copy_(x.detach())
        return self.started("gather", later)

    def _reduce_scatter(self, output: Tensor, parts: list[Tensor], *, later: bool = False) -> Any:
        output.copy_(torch.stack(parts).sum(0))
        return self.started("scatter", later)


def tensors(log: Log) -> tuple[Tensor, list[nn.Parameter]]:
    """Return an input, and the weight and bias of a layer and the weight of a second one, that log their gradients."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    found = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((8, WIDTH), (8,), (WIDTH, 8))]
    for name, each in zip(("weight", "bias", "second"), found, strict=True):
        each.register_post_accumulate_grad_hook(lambda _, name=name: log.append(name))  # type: ignore[no-untyped-call]
    return x, found


ORDERS = {
    "enter": ["sum later", "second", "bias", "weight", "wait for sum", "before"],
    "gather_enter": ["scatter later", "second", "bias", "weight", "wait for scatter", "before"],
    "gathered again": [
        "gather later", "scatter later", "second", "bias", "wait for gather", "weight", "wait for scatter", "before",
    ],
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ORDERS)
def test_gradients_of_weights_come_between_start_and_wait(kind: str, recompute: bool) -> None:
    log: Log = []
    exchange = LoggedExchange(log)
    x, (weight, bias, second) = tensors(log)
    before = x * 2
    before.register_hook(lambda _: log.append("before"))  # type: ignore[no-untyped-call]

    def compute(x: Tensor) -> Tensor:
        held = exchange.awaited(x)
        w, b, v = late(weight), late(bias), late(second)
        if kind == "enter":
            entered = exchange.enter_unawaited(held, True)
        else:
            entered = exchange.gather_enter_unawaited(held, 1, (6,), kind == "gathered again")
        return linear(linear(entered, w, b).square(), v)

    output = checkpoint(compute, before, use_reentrant=False) if recompute else compute(before)
    output.square().sum().backward()
    assert [each for each in log if each != "gather now"] == ORDERS[kind]
    assert log.count("gather now") == (0 if kind == "enter" else 1 + recompute)
    found = [each.grad for each in (x, weight, bias, second)]
    for each in (x, weight, bias, second):
        each.grad = None
    F.linear(F.linear(x * 2, weight, bias).square(), second).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, [each.grad for each in (x, weight, bias, second)], rtol=1e-12, atol=0)


@pytest.mark.parametrize("again", [False, True])
def test_layers_with_one_input_save_a_part_and_gather_once(again: bool) -> None:
    log: Log = []
    exchange, saved = LoggedExchange(log, ranks=2), list[torch.Size]()
    x, weight = tensors([])[0], nn.Parameter(torch.randn(8, WIDTH, dtype=torch.float64))

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = exchange.awaited(x * 2)
        seen = [late(weight) for _ in range(3)]
        whole: Any = exchange.gather_enter_unawaited(held, 1, (12,), again)
        outputs = [linear(whole, each) for each in seen]
    assert (torch.Size((2, 12, WIDTH)) in saved) != again
    assert (torch.Size((2, 6, WIDTH)) in saved) == again
    kept = getattr(whole, "regathered", None)
    sum(outputs).sum().backward()  # type: ignore[union-attr]
    assert log.count("gather later") == (1 if again else 0)
    assert kept is None or (kept.layers == 0 and kept._value is None)
    expected = torch.cat([x.detach() * 2] * 2, 1).sum((0, 1))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 3 * expected.expand(8, -1), rtol=1e-12, atol=0)


def test_a_gradient_that_others_read_is_not_summed_in_place() -> None:
    class Doubling(LoggedExchange):
        def _all_reduce(self, total: Tensor, op: Any, *, later: bool = False) -> Any:
            total *= 2
            return super()._all_reduce(total, op, later=later)

    for fresh in (False, True):
        x = torch.ones(SHAPE, requires_grad=True)
        exchange, seen = Doubling([]), list[Tensor]()
        entered = exchange.enter_unawaited(exchange.awaited(x), fresh)
        entered.register_hook(seen.append)  # type: ignore[no-untyped-call]
        (entered * 3).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full(SHAPE, 6.0))
        assert torch.equal(seen[0], torch.full(SHAPE, 6.0 if fresh else 3.0))


@pytest.mark.parametrize(("samples", "copies"), [(1, 0), (2, 1)])
def test_parts_of_a_single_sample_are_gathered_in_place(samples: int, copies: int) -> None:
    x = torch.randn(samples, 3, WIDTH)
    with mock.patch.object(torch, "cat", side_effect=torch.cat) as cat:
        found = LoggedExchange([], ranks=2).joined(x, 1, (6,))
    assert cat.call_count == copies
    torch.testing.assert_close(found, x.repeat(1, 2, 1))


def test_without_gradients_it_is_a_linear_layer() -> None:
    x, (weight, bias, _) = tensors([])
    with torch.no_grad():
        torch.testing.assert_close(linear(x, late(weight), late(bias)), F.linear(x, weight, bias))


class Gated(nn.Module):
    """A block of two halves: layers side by side, and a layer after them that ends in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16, bias=False)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.down(self.up(y) * self.gate(y).sigmoid())
        output: Tensor = self.head(x)
        return output


def rewritten(model: type[nn.Module] = Gated, *, direct: bool = False, sequence: bool = False) -> LocalGraph:
    graph, _ = local(model, torch.randn(2, 6, 8), 2, sequence=sequence)
    overlap(graph.graph, graph.step.tensors, direct=direct, again=True)
    return graph


def called(graph: LocalGraph) -> list[str]:
    """Name the calls that this file is about, in order."""
    names = ("awaited", "late", "enter_unawaited", "gather_enter_unawaited", "linear", "reduce", "reduce_scatter")
    found = [str(getattr(node.target, "__name__", "")) for node in graph.graph.nodes if node.op == "call_function"]
    return [each.removesuffix(".default") for each in found if each.removesuffix(".default") in names]


def test_layers_between_two_exchanges_wait_for_the_first() -> None:
    block = ["awaited", *["late"] * 4, "enter_unawaited", "linear", "linear", "linear", "reduce"]
    assert called(rewritten())[: len(block)] == block


def test_in_compiled_steps_layers_that_take_the_value_itself() -> None:
    graph = rewritten(direct=True)
    assert called(graph)[:5] == ["awaited", *["late"] * 3, "enter_unawaited"]
    down = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert down.args[1].name.endswith("down_weight")


def test_along_the_sequence() -> None:
    graph = rewritten(sequence=True)
    assert called(graph)[-6:] == ["reduce_scatter", "awaited", "late", "late", "gather_enter_unawaited", "linear"]
    assert gathered_again(graph) == [True]


def gathered_again(graph: LocalGraph) -> list[bool]:
    """Return for each value that is gathered whether the backward pass gathers it again."""
    targets = [(str(getattr(node.target, "__name__", "")), node.args) for node in graph.graph.nodes]
    return [bool(args[-1]) for name, args in targets if name == "gather_enter_unawaited"]


class Twice(Gated):
    """A gathered value that two operations take."""

    def second(self, x: Tensor) -> Tensor:
        output: Tensor = self.gate(x)
        return output

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(x))
        output: Tensor = self.up(x) * self.second(x)
        return output


def test_what_another_operation_saves_is_not_gathered_again() -> None:
    class Multiplied(Twice):
        def second(self, x: Tensor) -> Tensor:
            return x @ self.gate.weight.t()

    class Frozen(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.gate.requires_grad_(False)  # saves its weight only

    found = [gathered_again(rewritten(model, sequence=True)) for model in (Twice, Multiplied, Frozen)]
    assert found == [[True], [False], [True]]


def test_frozen_weights_have_no_gradient_to_wait_with() -> None:
    class Frozen(Gated):
        def __init__(self) -> None:
            super().__init__()
            for layer in (self.up, self.gate, self.down):
                layer.requires_grad_(False)

    graph = rewritten(Frozen)
    assert called(graph)[0] != "awaited"


def test_what_runs_beside_a_collective_stays_in_one_part() -> None:
    graph = rewritten()
    ((first, last), *_) = overlapping(graph.graph)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    inside = range(calls.index(first) + 1, calls.index(last) + 1)
    names = set(graph.placements)
    found = [point.position for point in find_cut_points(graph, names)]
    assert found
    assert not set(found) & set(inside)
    plain, _ = local(Gated, torch.randn(2, 6, 8), 2)
    assert len(find_cut_points(plain, names)) > len(found)  # it can be cut between layers otherwise
