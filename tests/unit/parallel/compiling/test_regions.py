"""Compiled regions: they compute what the plain calls compute, as few kernels, and save less for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.errors import StrategyError
from shardwise.parallel.compiling import compiler
from shardwise.parallel.compiling.kernels import modelled
from shardwise.parallel.compiling.regions import CompiledRegion, GraphRegion, pieces, write_elsewhere
from shardwise.predict.profile.segment_recorder import SegmentRecorder
from shardwise.strategy import Strategy
from shardwise.workload.precision import for_gpu

aten = torch.ops.aten
Function = Callable[..., tuple[Tensor, ...]]


def perceptron(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    return (x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), up)), down),)


def loss(x: Tensor, weight: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(F.linear(F.rms_norm(x, x.shape[-1:]), weight).float(), words),)


def attention(x: Tensor, into: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (part.view(2, 5, 2, 4).transpose(1, 2) for part in F.linear(x, into).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    return x + F.linear(mixed, out), mixed.softmax(-1)


def several(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    values, places = (x * y).max(-1)
    return (x - mean) * variance.rsqrt() + y.sum(0), values, places, torch.cat([x, y], 0)[1:].exp(), x.t()


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


CASES: dict[str, tuple[Function, list[Any]]] = {
    "perceptron": (perceptron, numbers((2, 3, 8), (16, 8), (8, 16))),
    "loss": (loss, [*numbers((6, 8), (11, 8)), torch.arange(6)]),
    "attention": (attention, numbers((2, 5, 8), (24, 8), (8, 8))),
    "several": (several, numbers((4, 6), (4, 6))),
}


def gradients(function: Function, arguments: list[Any]) -> list[Tensor]:
    """Return what a function gives, and the gradients of a weighted sum of it."""
    results = function(*arguments)
    weighted = [(each * torch.arange(each.numel()).view(each.shape)).sum() for each in results if each.requires_grad]
    wanted = [each for each in arguments if each.requires_grad]
    return [*results, *torch.autograd.grad(torch.stack(weighted).sum(), wanted)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_modelled_computes_the_same(name: str, gpu: bool) -> None:
    function, arguments = CASES[name]
    with for_gpu(gpu):
        made = modelled(function, arguments)
    torch.testing.assert_close(gradients(made, arguments), gradients(function, arguments))


def recorded(function: Function, *shapes: tuple[int, ...], gpu: bool = False) -> tuple[list[str], list[str], int]:
    """Return the kernels of the forward and of the backward pass, and the bytes that are saved between them."""
    recorder, saved = SegmentRecorder(cpu=not gpu), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), for_gpu(gpu):
        arguments = [torch.empty(shape, requires_grad=True) for shape in shapes]
        own = {each.untyped_storage()._cdata for each in arguments}
        with recorder:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                results = CompiledRegion(function)(*arguments)
            forward = [kernel.operation for kernel in recorder.take().kernels]
            torch.autograd.backward(results, [torch.empty_like(each) for each in results])
            backward = [kernel.operation for kernel in recorder.take().kernels]
    return forward, backward, sum(size for storage, size in saved.items() if storage not in own)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    normed = F.rms_norm(x, x.shape[-1:])
    return (x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down),)


def test_elementwise_operations_are_one_kernel() -> None:
    """The inputs of the products are saved, and of the activation its own inputs, but nothing in between."""
    rows, narrow, wide = 512, 64, 256
    forward, backward, saved = recorded(gated, (rows, narrow), (wide, narrow), (wide, narrow), (narrow, wide))
    product, fused = "aten.mm", "shardwise.fused"
    assert forward == [fused, product, product, fused, product, fused]
    assert sorted(backward) == [product] * 6 + [fused] * 2
    assert saved == 4 * rows * (3 * wide + narrow + 1)


def test_a_kernel_of_a_gpu_reduces_rows_and_columns() -> None:
    def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (F.rms_norm(x, x.shape[-1:], weight),)

    assert len(recorded(norm, (512, 1024), (1024,), gpu=True)[1]) == 1
    assert len(recorded(norm, (512, 1 << 15), (1 << 15,), gpu=True)[1]) == 2
    assert len(recorded(norm, (512, 1024), (1024,))[1]) == 2


def graph_of(*calls: tuple[Any, ...]) -> fx.Graph:
    """Build a graph of calls; numbers among their arguments stand for earlier values, 0 for the input."""
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for target, *arguments in calls:
        values.append(graph.call_function(target, tuple(values[each] for each in arguments)))
    for value in values:
        value.meta.update(shape=(4, 4), dtype=torch.float32)
    graph.output((values[-1],))
    return graph


def cut(graph: fx.Graph, compiled: str = "all", *, again: bool = False) -> list[str]:
    """Return the pieces of a graph: the names of single calls, and for a region the number of its calls."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    found = pieces(nodes, nodes[-1:], compiled, again=again)
    return [f"region of {len(each.nodes)}" if isinstance(each, GraphRegion) else each.name for each in found]


def exchange(x: Tensor) -> Tensor:
    return x


def test_regions_end_at_communication() -> None:
    graph = graph_of(
        (aten.exp.default, 0), (aten.mm.default, 1, 0), (exchange, 2), (aten.t.default, 3), (aten.sin.default, 4)
    )
    assert cut(graph) == ["region of 2", "exchange", "region of 2"]
    assert cut(graph, "rest") == ["region of 1", "mm_default", "exchange", "region of 2"]
    assert cut(graph, again=True) == ["region of 1", "mm_default", "exchange", "region of 2"]
    assert cut(graph, "") == [node.name for node in graph.nodes if node.op == "call_function"]


def test_views_are_made_outside_of_regions() -> None:
    """Views of a value that a region computes, and of one that it is given."""
    graph = graph_of((aten.exp.default, 0), (aten.t.default, 1), (exchange, 2))
    assert cut(graph) == ["region of 1", "t_default", "exchange"]
    given = graph_of((aten.t.default, 0), (aten.exp.default, 1), (exchange, 2), (aten.add.Tensor, 1, 3))
    assert cut(given) == ["region of 2", "t_default", "exchange", "region of 1"]


def test_values_that_nothing_else_reads_are_not_overwritten() -> None:
    graph = graph_of((aten.exp.default, 0), (aten.relu_.default, 1), (aten.sin.default, 2))
    write_elsewhere(graph)
    assert [node.target for node in graph.nodes][2] is aten.relu.default
    assert cut(graph) == ["region of 3"]
    read = graph_of((aten.exp.default, 0), (aten.relu_.default, 1), (aten.add.Tensor, 1, 2))
    write_elsewhere(read)
    assert [node.target for node in read.nodes][2] is aten.relu_.default
    assert len(cut(read)) == 3  # a section that overwrites something is not compiled


def test_what_the_compiler_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Strategy(compile=1)
    compiler.check_compiler(wanted, "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.check_compiler(Strategy(), "cpu")
    with pytest.raises(StrategyError, match=r"no no-such-compiler: install the package g\+\+, or leave compile=1 out"):
        compiler.check_compiler(wanted, "cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(StrategyError, match="install the package triton"):
        compiler.check_compiler(wanted, "gpu")
