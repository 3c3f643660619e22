"""Collectives of a backward pass run beside the gradients of weights, and all gradients are the same."""

from __future__ import annotations

from typing import Any

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


class LoggedExchange(Exchange):
    """Exchange of one worker that logs when collectives start, and when they are waited for."""

    def __init__(self, log: Log) -> None:
        super().__init__(None, 0, 1)
        self.log = log

    def _all_reduce(self, total: Tensor, op: Any, *, later: bool = False) -> Any:
        self.log.append(f"sum {'later' if later else 'now'}")
        return self

    def _all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        parts[0].copy_(x)

    def _reduce_scatter(self, output: Tensor, parts: list[Tensor], *, later: bool = False) -> Any:
        self.log.append(f"scatter {'later' if later else 'now'}")
        output.copy_(parts[0])
        return self

    def wait(self) -> None:
        self.log.append("wait")


def tensors(log: Log) -> tuple[Tensor, list[nn.Parameter]]:
    """Return an input, and the weight and bias of a layer and the weight of a second one, that log their gradients."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    found = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((8, WIDTH), (8,), (WIDTH, 8))]
    for name, each in zip(("weight", "bias", "second"), found, strict=True):
        each.register_post_accumulate_grad_hook(lambda _, name=name: log.append(name))  # type: ignore[no-untyped-call]
    return x, found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_of_weights_come_between_start_and_wait(sequence: bool, recompute: bool) -> None:
    log: Log = []
    exchange = LoggedExchange(log)
    x, (weight, bias, second) = tensors(log)
    before = x * 2
    before.register_hook(lambda _: log.append("before"))  # type: ignore[no-untyped-call]

    def compute(x: Tensor) -> Tensor:
        held = exchange.awaited(x)
        w, b, v = late(weight), late(bias), late(second)
        entered = exchange.gather_enter_unawaited(held, 1, (6,)) if sequence else exchange.enter_unawaited(held, True)
        return linear(linear(entered, w, b).square(), v)

    output = checkpoint(compute, before, use_reentrant=False) if recompute else compute(before)
    output.square().sum().backward()
    start = "scatter later" if sequence else "sum later"
    assert log == [start, "second", "bias", "weight", "wait", "before"]
    found = [each.grad for each in (x, weight, bias, second)]
    for each in (x, weight, bias, second):
        each.grad = None
    F.linear(F.linear(x * 2, weight, bias).square(), second).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, [each.grad for each in (x, weight, bias, second)], rtol=1e-12, atol=0)


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
    overlap(graph.graph, graph.step.tensors, direct=direct)
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
    found = called(rewritten(sequence=True))
    assert found[-6:] == ["reduce_scatter", "awaited", "late", "late", "gather_enter_unawaited", "linear"]


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
