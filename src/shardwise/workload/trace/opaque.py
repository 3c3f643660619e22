"""Modules and functions that are not traced, each represented by one call in the graph of a step.

A call is recorded by running the model once on real data: the arguments of the module and the shapes of its results.
In a trace, the operator `shardwise::opaque` stands for the call; an engine that runs the graph calls the module itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum, FunctionType)
"""Types that a module may take and return beside tensors."""

_CALLS: WeakValueDictionary[int, Call] = WeakValueDictionary()
_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a step.

    Attributes:
        module: module that is called.
        path: name of the module in the model.
        reason: one line for the user that names it and says why it is not traced.
        state: names of its parameters and buffers, which come first among the operator's tensors.
        leaves: flattened arguments, with a placeholder for each tensor.
        spec: tree structure of the arguments.
        outputs: meta tensors with the shapes of the module's results.
        results: flattened output, with a placeholder for each tensor.
        result_spec: tree structure of the output.
        draws: number of calls inside it that draw dropout.
        modes: map from the module and its submodules to whether each was in training mode.
        differentiable: for each of `outputs` whether a gradient may flow back through it.
    """

    module: nn.Module
    path: str
    reason: str
    state: tuple[str, ...]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    outputs: tuple[Tensor, ...]
    results: tuple[Any, ...]
    result_spec: TreeSpec
    draws: int
    modes: dict[nn.Module, bool]
    differentiable: tuple[bool, ...]

    def on(self, module: nn.Module) -> Call:
        """Return the same call of another module of the same kind."""
        names = {each: name for name, each in self.module.named_modules()}
        modes = {module.get_submodule(names[each]): mode for each, mode in self.modes.items()}
        return replace(self, module=module, modes=modes)

    def forget_values(self) -> None:
        """Free the module's tensors, which are not needed because every call passes others in their place."""
        self.module.to("meta")

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call the module with its state and its arguments from `tensors`, and return the tensors of its output.

        Raises RuntimeError if the shapes or plain values of the output differ from those of the recorded call.
        """
        count = len(self.state)
        args, kwargs = tree_unflatten(filled(self.leaves, tensors[count:]), self.spec)
        state = {f"module.{name}": tensor for name, tensor in zip(self.state, tensors[:count], strict=True)}
        with _in_modes(self.modes):
            output = functional_call(_Whole(self.module), state, args, kwargs)
        found, results, _ = split(output)
        now, first = _shapes(found, results), _shapes(self.outputs, self.results)
        if now != first:
            raise RuntimeError(
                f"{self.path} gave {now}, at first {first}: neither shapes nor numbers may follow the data"
            )
        return tuple(found)


def filled(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Replace the placeholders in a flattened tree by tensors, in order."""
    given = iter(tensors)
    return [next(given) if isinstance(leaf, _Placeholder) else leaf for leaf in leaves]


@contextmanager
def _in_modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    before = {module: module.training for module in modes}
    for module, training in modes.items():
        module.training = training
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


class _Whole(nn.Module):
    """Wrapper of a module that copies assignments to buffers into the tensors that were passed for them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with assignments_copied(self.module):
            return self.module(*args, **kwargs)


@contextmanager
def assignments_copied(model: nn.Module) -> Iterator[None]:
    """Copy what submodules assign to their buffers into the buffers; torch does so for the outermost module only."""
    held = [(module, key, buffer) for module in model.modules() for key, buffer in module._buffers.items()]
    yield
    for module, key, buffer in held:
        assigned = module._buffers.get(key)
        if buffer is not None and assigned is not None and assigned is not buffer:
            buffer.copy_(assigned)
            module._buffers[key] = buffer


def _shapes(tensors: Sequence[Tensor], leaves: Sequence[Any]) -> list[Any]:
    """Return the structure of an output: the shapes of its tensors and its plain values."""
    return filled(leaves, [tuple(each.shape) for each in tensors])  # type: ignore[misc]


class _Placeholder:
    """Placeholder for a tensor in a flattened tree."""


def split(tree: Any) -> tuple[list[Tensor], tuple[Any, ...], TreeSpec]:
    """Return the tensors in a tree, its leaves with a placeholder for each of them, and its structure.

    Raises TypeError if it holds an object that may hide tensors.
    """
    leaves, spec = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))), None)
    if strange is not None:
        raise TypeError(f"a value of type {type(strange).__name__} goes in or out, which may hide tensors")
    return tensors, tuple(_Placeholder() if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec


@torch.library.custom_op("shardwise::opaque", mutates_args=())
def operator(tensors: list[Tensor], number: int) -> list[Tensor]:
    """Run the call `number` without gradient; results are cloned, as operators may not return their inputs."""
    return [result.clone() for result in run_opaque(tensors, number)]


def run_opaque(tensors: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
    """Run the call `number` outside of the operator, inside of which no derivative can be taken."""
    return _CALLS[number].run(tensors)


@operator.register_fake
def _(tensors: list[Tensor], number: int) -> list[Tensor]:
    like = tensors[0]
    return [like.new_empty(each.shape, dtype=each.dtype) for each in _CALLS[number].outputs]


OPAQUE = torch.ops.shardwise.opaque.default


def call_of(number: int) -> Call:
    """Return the call that an operator stands for; it only lives as long as the graph's user holds it."""
    return _CALLS[number]


def entered(call: Call, tensors: Sequence[Tensor]) -> Any:
    """Enter the operator that stands for `call` into the running trace, and return the output of the call.

    Args:
        call: the call.
        tensors: the state of its module, and the tensors among its arguments.
    """
    number = next(_NUMBERS)
    _CALLS[number] = call
    results = operator(list(tensors), number)
    return tree_unflatten(filled(call.results, results), call.result_spec)


def rehomed(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[Call, ...]:
    """Make the calls of modules at these paths on `modules`, and return all calls. Changes the graph in place."""
    calls = []
    for node in graph.nodes:
        if node.target is OPAQUE:
            call = call_of(node.args[1])
            if call.path in modules:
                number = next(_NUMBERS)
                call = _CALLS[number] = call.on(modules[call.path])
                node.args = (node.args[0], number)
            calls.append(call)
    return tuple(calls)


def calls_in(graph: fx.Graph) -> tuple[Call, ...]:
    """Return the calls that the operators in a graph stand for."""
    return tuple(call_of(node.args[1]) for node in graph.nodes if node.target is OPAQUE)


class CallRecorder:
    """Recorder of a module's calls while it is open; `drawn` returns how many calls have drawn dropout so far."""

    def __init__(self, module: nn.Module, path: str, reason: str, drawn: Any) -> None:
        self.calls: list[Call] = []
        self.module, self._path, self._reason, self._drawn = module, path, reason, drawn

    @contextmanager
    def open(self) -> Iterator[None]:
        """Record the module's calls inside the context."""
        own = self.module.__dict__.get("forward")
        original = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = self._drawn()
            _, leaves, spec = split((args, kwargs))
            output = original(*args, **kwargs)
            tensors, results, result_spec = split(output)
            self.calls.append(
                Call(
                    self.module,
                    self._path,
                    f"module {self._path!r} cannot be traced ({self._reason})",
                    tuple(_state(self.module)),
                    leaves,
                    spec,
                    tuple(torch.empty_like(each, device="meta") for each in tensors),
                    results,
                    result_spec,
                    self._drawn() - before,
                    {module: module.training for module in self.module.modules()},
                    tuple(each.requires_grad or not torch.is_grad_enabled() for each in tensors),
                )
            )
            return output

        self.module.forward = forward
        try:
            yield
        finally:
            _restore(self.module, own)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.forward = own


@contextmanager
def hidden(calls: Mapping[str, Sequence[Call]]) -> Iterator[None]:
    """Replace recorded modules by the operator inside the context, so that a trace does not enter them."""
    replaced = []
    for of_module in calls.values():
        module = of_module[0].module
        replaced.append((module, module.__dict__.get("forward")))
        module.forward = _stand_in(of_module)
    try:
        yield
    finally:
        for module, own in replaced:
            _restore(module, own)


def _stand_in(calls: Sequence[Call]) -> Any:
    left = iter(calls)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(left)
        tensors, _, _ = split((args, kwargs))
        return entered(call, [*_state(call.module).values(), *tensors])

    return forward
