"""What one link of a step needs: its calls run on tensors without data, forwards and backwards, and noted down."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.parallel.exchange import Exchange
from shardwise.parallel.memory import writes_in_place
from shardwise.parallel.selective import is_product
from shardwise.predict.accelerated import on_gpu
from shardwise.predict.counting import kernel_of, tensors, workspace
from shardwise.predict.kernel import Kernel
from shardwise.predict.profile import Exchanged, Layer, Pass


@dataclass(frozen=True, slots=True)
class Spec:
    """How a tensor lies in memory, without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        """A tensor like that; a leaf."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return made.requires_grad_(self.grad)

    @property
    def bytes(self) -> int:
        """Of the elements."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Output:
    """What a link makes.

    Attributes:
        spec: how it lies.
        alias: the input in whose memory it lies; None: it has memory of its own.
        held: bytes of that memory.
        saved: whether the link keeps it for its backward pass.
    """

    spec: Spec
    alias: int | None
    held: int
    saved: bool


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found out about a link.

    Attributes:
        layer: what it needs.
        outputs: what it makes.
        saved: inputs that it keeps for its backward pass.
        ready: its parameters with a gradient, in the order in which these appear.
    """

    layer: Layer
    outputs: tuple[Output, ...]
    saved: frozenset[int]
    ready: tuple[int, ...]


class NotedExchange(Exchange):
    """The exchanges of the first of `ranks` tensor-parallel workers, noted down instead of done."""

    def __init__(self, ranks: int, recorder: LinkRecorder) -> None:
        super().__init__(None, 0, ranks)
        self._recorder = recorder

    def _all_reduce(self, total: Tensor, op: Any) -> None:
        self._recorder.exchange("all_reduce", total)

    def _all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        self._recorder.exchange("all_gather", *parts)

    def _reduce_scatter(self, output: Tensor, parts: list[Tensor]) -> None:
        self._recorder.exchange("reduce_scatter", *parts)


class LinkRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes kernels, exchanges and memory of what runs on tensors without data.

    Args:
        cpu: whether it is noted for a CPU, where some kernels need memory while they run.

    Attributes:
        kernels: since `take` was called last.
        exchanges: likewise.
        normalised: channels of batch norms, likewise.
        products: bytes of the results of products, see `parallel.selective`, likewise.
        live: bytes in tensors that were made while it was on and that are still there.
        peak: the most of that since `watch` was called last.
        when: `forward` or `backward`.
    """

    def __init__(self, *, cpu: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cpu = cpu
        self.kernels: list[Kernel] = []
        self.exchanges: list[Exchanged] = []
        self.normalised: list[int] = []
        self.products = 0
        self.live = self.peak = 0
        self.when = "forward"
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kernel = kernel_of(function, args, kwargs or {}, result, self.when)
        if kernel is not None:
            self.kernels.append(kernel)
        for tensor in tensors(result):
            self._note(tensor)
        if self.when == "forward" and is_product(function):
            self.products += sum(tensor.untyped_storage().nbytes() for tensor in tensors(result))
        if kernel is not None and self.cpu:
            self.peak = max(self.peak, self.live + workspace(kernel))
        return result

    def exchange(self, operation: str, *parts: Tensor) -> None:
        """Notes an exchange of all `parts` together."""
        self.exchanges.append(Exchanged(operation, sum(part.numel() * part.element_size() for part in parts)))

    def take(self) -> Pass:
        """What was noted since the last call."""
        taken = Pass(tuple(self.kernels), tuple(self.exchanges))
        self.kernels, self.exchanges = [], []
        return taken

    def watch(self) -> int:
        """Begins to look for the peak of memory; returns the bytes that are there."""
        self.peak = self.live
        return self.live

    def forget(self, tensor: Tensor) -> None:
        """What `tensor` takes does not count from here on."""
        self._free(_place(tensor))

    def _note(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[place] = storage.nbytes()
        self.live += self._sizes[place]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, place)

    def _free(self, place: int) -> None:
        self.live -= self._sizes.pop(place, 0)


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True, slots=True, eq=False)
class Calls:
    """One link as it lies in the graph.

    Attributes:
        nodes: its calls.
        weights: parameters and buffers that it uses.
        given: what comes from the batch.
        inputs: what other links made.
        outputs: what it makes for others.
        again: inputs that later links use too: their gradients are added up.
        loss: whether its first output is the loss.
    """

    nodes: Sequence[fx.Node]
    weights: Mapping[fx.Node, Spec]
    given: Mapping[fx.Node, Any]
    inputs: Mapping[fx.Node, Spec]
    outputs: Sequence[fx.Node]
    again: frozenset[fx.Node]
    loss: bool


@dataclass(slots=True)
class Analyst:
    """Finds out what links need; equal ones once.

    Attributes:
        mode: in which tensors have no data.
        recorder: what notes.
        bf16: whether to compute in bfloat16 where torch's autocast says so.
        gpu: whether to compute as a GPU does it.
        later: work on weights that is put off, see `parallel.deferred`; None: none is.
        sites: function -> argument that numbers the calls that draw, which makes no difference here.
    """

    mode: FakeTensorMode
    recorder: LinkRecorder
    bf16: bool
    gpu: bool
    later: Any = None
    sites: Mapping[Any, int] = field(default_factory=dict)
    _known: dict[Any, Analysis] = field(default_factory=dict)

    def link(self, calls: Calls) -> Analysis:
        """What one link needs."""
        key = self._key(calls)
        if key not in self._known:
            self._known[key] = _Run(self, calls).analysis()
        return self._known[key]

    def _key(self, link: Calls) -> Any:
        number: dict[fx.Node, int] = {}
        described: list[Any] = []
        for node, spec in (*link.weights.items(), *link.inputs.items()):
            number[node] = len(number)
            described.append((spec, node in link.again))
        for node, value in link.given.items():
            number[node] = len(number)
            described.append(Spec.of(value) if isinstance(value, Tensor) else str(value))
        calls = []
        for node in link.nodes:
            target = _function(node.target)
            site = self.sites.get(target[0])
            arguments = [_literal(a, number) for index, a in enumerate(node.args) if index != site]
            calls.append((target, tuple(arguments), _literal(dict(node.kwargs), number)))
            number[node] = len(number)
        return (
            tuple(described),
            tuple(calls),
            tuple(number[node] for node in link.outputs),
            len(link.weights),
            link.loss,
        )


def _function(target: Any) -> tuple[Any, ...]:
    """What a call calls, comparable: a function with arguments bound to it is made anew for each call."""
    if hasattr(target, "func"):
        return target.func, str(target.args), str(target.keywords)
    return (target,)


def _literal(value: Any, number: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return "node", number[value]
    if isinstance(value, (list, tuple)):
        return tuple(_literal(item, number) for item in value)
    if isinstance(value, dict):
        return tuple((key, _literal(item, number)) for key, item in value.items())
    return repr(value) if isinstance(value, float) else str(value)


class _Arrived(torch.autograd.Function):
    """What another link made: its gradient goes there, and is not copied into a leaf as that of a parameter may be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@dataclass(slots=True)
class _Run:
    """One link as it runs."""

    analyst: Analyst
    link: Calls
    _saved: dict[int, int] = field(default_factory=dict)
    _at_last: tuple[int, int] | None = None
    _ready: list[int] = field(default_factory=list)

    def analysis(self) -> Analysis:
        recorder = self.analyst.recorder
        with self.analyst.mode:
            values: dict[fx.Node, Any] = {node: spec.empty() for node, spec in self.link.weights.items()}
            leaves = [(index, value) for index, value in enumerate(values.values()) if value.requires_grad]
            values.update({node: _Arrived.apply(spec.empty()) for node, spec in self.link.inputs.items()})  # type: ignore[no-untyped-call]
            arrived = [values[node] for node in self.link.inputs]
            apart = {_place(value) for node, value in values.items() if node in self.link.weights}
            values.update(self.link.given)
            for index, leaf in leaves:
                leaf.register_post_accumulate_grad_hook(lambda _, leaf=leaf, index=index: self._complete(leaf, index))
            with recorder:
                begin = recorder.watch()
                results = self._forward(values)
                top, end = recorder.peak, recorder.live
                forward = recorder.take()
                normalised, recorder.normalised = tuple(recorder.normalised), []
                products, recorder.products = recorder.products, 0
                places = {_place(value): index for index, value in enumerate(arrived)}
                made = [self._output(result, places) for result in results]
                inner = self._inside(apart, places, results)
                saved = frozenset(places[place] for place in self._saved if place in places)
                backward, weights, most = self._backward(results)
            recomputed = Pass()
            if self._at_last is not None:
                kernels, exchanges = self._at_last
                recomputed = Pass(forward.kernels[:kernels], forward.exchanges[:exchanges])
        del begin
        layer = Layer(
            forward=forward,
            backward=backward,
            weights=weights,
            recomputed=recomputed,
            keeps=self._at_last is not None,
            inside=inner,
            products=products,
            temporary_forward=top - end,
            temporary_backward=most,
            normalised=normalised,
        )
        return Analysis(layer, tuple(made), saved, tuple(self._ready))

    def _forward(self, values: dict[fx.Node, Any]) -> list[Tensor]:
        recorder, clean = self.analyst.recorder, not any(writes_in_place(node) for node in self.link.nodes)
        recorder.when = "forward"
        if not clean:
            for node in self.link.inputs:  # as `sections.compiled` does it
                values[node] = values[node].clone()
        last = {argument: node for node in self.link.nodes for argument in node.all_input_nodes}
        with torch.enable_grad(), self._saving(), self._precision():
            for node in self.link.nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: values[argument])
                call = on_gpu(node.target) if self.analyst.gpu else node.target  # type: ignore[arg-type]
                values[node] = call(*args, **kwargs)  # type: ignore[operator]
                for argument in node.all_input_nodes:
                    if last[argument] is node and argument not in self.link.outputs:
                        values.pop(argument, None)
                if node not in last and node not in self.link.outputs:
                    values.pop(node, None)
        return [values[node] for node in self.link.outputs]

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if not self.analyst.bf16:
            yield
            return
        with torch.autocast("cpu", torch.bfloat16):
            yield

    @contextmanager
    def _saving(self) -> Iterator[None]:
        recorder = self.analyst.recorder

        def pack(tensor: Tensor) -> Tensor:
            self._saved[_place(tensor)] = tensor.untyped_storage().nbytes()
            self._at_last = len(recorder.kernels), len(recorder.exchanges)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _output(self, result: Any, places: Mapping[int, int]) -> Output:
        place = _place(result)
        held = result.untyped_storage().nbytes()
        alias = places.get(place)
        return Output(Spec.of(result), alias, held, alias is None and place in self._saved)

    def _inside(self, apart: set[int], places: Mapping[int, int], results: Sequence[Tensor]) -> int:
        own = {_place(value) for value in self.link.given.values() if isinstance(value, Tensor)}
        others = apart | set(places) | {_place(result) for result in results} | own
        return sum(size for place, size in self._saved.items() if place not in others)

    def _backward(self, results: list[Tensor]) -> tuple[Pass, Pass, int]:
        """(backward pass, weights' part of it where that is put off, most bytes meanwhile)."""
        recorder = self.analyst.recorder
        roots = [result for result in (results[:1] if self.link.loss else results) if result.requires_grad]
        if not roots:
            return Pass(), Pass(), 0
        recorder.when = "backward"
        gradients = [torch.empty_like(root) for root in roots]
        recorder.take()
        begin = recorder.watch() - sum(g.numel() * g.element_size() for g in gradients)
        later = self.analyst.later
        if later is not None:
            later.begin((0, 0))
        torch.autograd.backward(roots, gradients)
        if later is not None:
            later.begin(None)
        self._add_up()
        backward, weights = recorder.take(), Pass()
        if later is not None:
            later.compute((0, 0))
            weights = recorder.take()
        most = recorder.peak - begin
        recorder.when = "forward"
        return backward, weights, most

    def _add_up(self) -> None:
        """Gradients of inputs that later links use too are added to those that came from there."""
        for node in self.link.again:
            spec = self.link.inputs[node]
            if spec.grad:
                elements = spec.bytes // spec.dtype.itemsize
                like = spec.empty().detach()
                kernel = kernel_of(torch.ops.aten.add.Tensor, (like, like), {}, like, "backward")
                assert kernel is not None, elements
                self.analyst.recorder.kernels.append(kernel)

    def _complete(self, tensor: Tensor, index: int) -> None:
        if tensor.grad is not None:  # none flows back where a function gives none
            self._ready.append(index)
            self.analyst.recorder.forget(tensor.grad)
