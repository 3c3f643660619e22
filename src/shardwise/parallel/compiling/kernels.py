"""Run a region on tensors without data as torch's compiler would run it: its kernels, and what it saves.

The graphs of the forward and of the backward pass are those that the compiler gets: made by AOTAutograd, with the
compiler's decompositions, and cut by the same min-cut partitioner that decides what is saved and what is recomputed.
`fusion` groups their operations into kernels. Each is one operation of torch, `shardwise::fused`, so that it counts
once wherever operations and bytes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from shardwise.parallel.compiling.fusion import FusedKernel, grouped, last_uses
from shardwise.workload.precision import is_for_gpu

_KERNELS: WeakValueDictionary[int, _Kernel] = WeakValueDictionary()
"""Kernels by number; each lives as long as the pass that runs it."""

_NUMBERS = count()


def modelled(function: Callable[..., tuple[Any, ...]], arguments: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """Return a function that runs as `function` would run after it was compiled for arguments like these.

    It is traced in a thread of its own, where no mode and no hook of this thread sees that.
    """
    from functorch.compile import aot_function, min_cut_rematerialization_partition  # type: ignore[import-untyped]
    from torch._inductor.decomposition import select_decomp_table

    steps = partial(_Steps, gpu=is_for_gpu())
    made: Callable[..., tuple[Any, ...]] = aot_function(
        function,
        fw_compiler=steps,
        bw_compiler=steps,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    like = [_like(each) if isinstance(each, Tensor) else each for each in arguments]
    with ThreadPoolExecutor(1) as thread:
        thread.submit(made, *like).result()
    return made


def _like(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Kernel:
    """A fused kernel that can be run.

    Attributes:
        number: its number, by which the operation `shardwise::fused` finds it.
        outputs: its results in the trace, for their shapes.
    """

    def __init__(self, kernel: FusedKernel) -> None:
        self.number = next(_NUMBERS)
        _KERNELS[self.number] = self
        self._graph = _subgraph(kernel)
        self.outputs = [node.meta["val"] for node in kernel.outputs]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the results from values."""
        results: list[Tensor] = list(fx.Interpreter(fx.GraphModule(torch.nn.Module(), self._graph)).run(*inputs))
        return results


def _subgraph(kernel: FusedKernel) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"x{number}") for number, node in enumerate(kernel.inputs)}
    for node in kernel.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in kernel.outputs))
    return graph


@torch.library.custom_op("shardwise::fused", mutates_args=())
def fused(inputs: list[Tensor], kernel: int) -> list[Tensor]:
    """Run a fused kernel on tensors with values."""
    return [result.clone() for result in _KERNELS[kernel].run(inputs)]


@fused.register_fake
def _(inputs: list[Tensor], kernel: int) -> list[Tensor]:
    return [
        torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        for like in _KERNELS[kernel].outputs
    ]


class _Steps:
    """A graph of a pass as a function of a list of arguments, which it empties, as torch's compiler calls it."""

    _boxed_call = True

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], *, gpu: bool) -> None:
        graph = module.graph
        self._module = module
        self._holders = [node for node in graph.nodes if node.op == "placeholder"]
        self._constants = [node for node in graph.nodes if node.op == "get_attr"]
        self._results = next(node for node in graph.nodes if node.op == "output").args[0]
        self._steps = grouped(graph, gpu=gpu)
        self._kernels = {step: _Kernel(step) for step in self._steps if isinstance(step, FusedKernel)}
        wanted = [each for each in self._results if isinstance(each, fx.Node)]
        self._dead = last_uses(self._steps, wanted)

    def __call__(self, arguments: list[Any]) -> tuple[Any, ...]:
        values: dict[fx.Node, Any] = dict(zip(self._holders, arguments, strict=True))
        values.update({node: getattr(self._module, str(node.target)) for node in self._constants})
        arguments.clear()
        for number, step in enumerate(self._steps):
            if isinstance(step, FusedKernel):
                results = torch.ops.shardwise.fused([values[node] for node in step.inputs], self._kernels[step].number)
                values.update(zip(step.outputs, results, strict=True))
            else:
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
            for node in self._dead.get(number, ()):
                del values[node]
        return tuple(values[each] if isinstance(each, fx.Node) else each for each in self._results)
