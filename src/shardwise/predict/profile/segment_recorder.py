"""Measure what one segment of a step needs by running it on tensors without data, forward and backward.

A segment is the piece of the step's graph between two neighbouring cut points. The result is its kernels, its
tensor-parallel collectives, and the bytes that it saves for the backward pass or needs temporarily.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.parallel.compiling.regions import GraphRegion, inputs_of, outputs_of, pieces
from shardwise.parallel.operators.selective_checkpoint import is_saved
from shardwise.parallel.pipeline.subgraphs import function_of
from shardwise.parallel.tensor.aliasing import writes_in_place
from shardwise.parallel.tensor.communication import Exchange
from shardwise.predict.profile.gpu_ops import on_gpu
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.op_counter import kernel_of, tensors, workspace
from shardwise.predict.profile.profile import Exchanged, Layer, LayerPass
from shardwise.workload.precision import for_gpu


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape, strides and dtype of a tensor, and whether it requires a gradient."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Return the spec of `tensor`."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        """Create an uninitialized leaf tensor that matches the spec."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return made.requires_grad_(self.grad)

    @property
    def bytes(self) -> int:
        """Return the bytes of all elements of the shape, counted as if none shared memory."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a segment.

    Attributes:
        spec: shape, strides and dtype.
        alias: index of the input whose storage it shares; None if it has a storage of its own.
        held: bytes of its storage.
        saved: whether the segment saves it for its own backward pass; False for an alias.
    """

    spec: Spec
    alias: int | None
    held: int
    saved: bool


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that was measured of one segment.

    Attributes:
        layer: its kernels, collectives and bytes.
        outputs: its outputs, in the order of `SegmentCalls.outputs`.
        saved: indices of the inputs that it saves for its backward pass.
        ready: indices of the weights that receive a gradient, in the order in which their gradients become complete.
    """

    layer: Layer
    outputs: tuple[Output, ...]
    saved: frozenset[int]
    ready: tuple[int, ...]


class RecordedExchange(Exchange):
    """Collectives of tensor-parallel rank 0 among `ranks`, recorded instead of executed."""

    def __init__(self, ranks: int, recorder: SegmentRecorder) -> None:
        super().__init__(None, 0, ranks)
        self._recorder = recorder

    def _all_reduce(self, total: Tensor, op: Any, *, later: bool = False) -> RecordedWork:
        return self._recorder.exchange("all_reduce", total)

    def _all_gather(self, parts: list[Tensor], x: Tensor, *, later: bool = False) -> RecordedWork:
        return self._recorder.exchange("all_gather", *parts)

    def _reduce_scatter(self, output: Tensor, parts: list[Tensor], *, later: bool = False) -> RecordedWork:
        return self._recorder.exchange("reduce_scatter", *parts)


@dataclass(frozen=True, slots=True)
class RecordedWork:
    """Handle of a recorded collective: what is recorded until someone waits for it runs beside it.

    Attributes:
        recorder: the recorder.
        exchange, kernels: number of collectives and of kernels recorded before it.
    """

    recorder: SegmentRecorder
    exchange: int
    kernels: int

    def wait(self) -> None:
        """Note the kernels that were recorded since the collective started."""
        exchanges, kernels = self.recorder.exchanges, self.recorder.kernels
        exchanges[self.exchange] = replace(exchanges[self.exchange], beside=tuple(kernels[self.kernels :]))


class SegmentRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the kernels, tensor-parallel collectives and memory of operations on tensors without data.

    Args:
        cpu: whether to record for a CPU, on which some kernels need workspace memory while they run.

    Attributes:
        kernels: kernels since the last call of `take`.
        exchanges: tensor-parallel collectives since the last call of `take`.
        at_product: (kernels, exchanges) before the last product since the last call of `take`; None if there was none.
        normalised: channels of each batch norm since the caller last emptied the list.
        products: bytes of the results that selective recomputation keeps (see
            `parallel.operators.selective_checkpoint`), since the caller
            last reset it.
        live: bytes of the storages that were created while recording and still exist.
        peak: largest value of `live`, workspaces included, since the last call of `watch`.
        when: `forward` or `backward`; the caller sets it.
    """

    def __init__(self, *, cpu: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cpu = cpu
        self.kernels: list[Kernel] = []
        self.exchanges: list[Exchanged] = []
        self.normalised: list[int] = []
        self.at_product: tuple[int, int] | None = None
        self.products = 0
        self.live = self.peak = 0
        self.when = "forward"
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kernel = kernel_of(function, args, kwargs or {}, result, self.when)
        if kernel is not None:
            if kernel.product:
                self.at_product = len(self.kernels), len(self.exchanges)
            self.kernels.append(kernel)
        for tensor in tensors(result):
            self._note(tensor)
        if self.when == "forward" and is_saved(function):
            self.products += sum(tensor.untyped_storage().nbytes() for tensor in tensors(result))
        if kernel is not None and self.cpu:
            self.peak = max(self.peak, self.live + workspace(kernel))
        return result

    def exchange(self, operation: str, *parts: Tensor) -> RecordedWork:
        """Record one collective whose message is all `parts` together. Returns a handle to wait for it."""
        self.exchanges.append(Exchanged(operation, sum(part.numel() * part.element_size() for part in parts)))
        return RecordedWork(self, len(self.exchanges) - 1, len(self.kernels))

    def take(self) -> LayerPass:
        """Return the kernels and collectives recorded since the last call."""
        taken = LayerPass(tuple(self.kernels), tuple(self.exchanges))
        self.kernels, self.exchanges, self.at_product = [], [], None
        return taken

    def watch(self) -> int:
        """Restart the search for the memory peak and return the bytes that are live now."""
        self.peak = self.live
        return self.live

    def forget(self, tensor: Tensor) -> None:
        """Stop counting the storage of `tensor`."""
        self._free(_storage_id(tensor))

    def _note(self, tensor: Tensor) -> None:
        storage_id = _storage_id(tensor)
        if storage_id in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[storage_id] = storage.nbytes()
        self.live += self._sizes[storage_id]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage_id)

    def _free(self, storage_id: int) -> None:
        self.live -= self._sizes.pop(storage_id, 0)


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentCalls:
    """The calls of a segment with their inputs and outputs in the graph.

    Attributes:
        nodes: its calls, in order.
        weights: parameters and buffers that it uses.
        given: values that are computed from the batch.
        inputs: values that other segments compute.
        outputs: values that it computes for other segments.
        again: inputs that later segments use too, so that their gradients have to be accumulated.
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
    """Analyses segments and caches the result, so that equal segments run only once.

    Attributes:
        mode: mode under which tensors have no data.
        recorder: records what runs.
        gpu: whether to run the operations that a GPU would run.
        later: store of the weight gradients that a zero-bubble schedule computes later (see
            `parallel.pipeline.weight_gradients`); None if each backward pass computes all gradients.
        sites: function that draws random numbers -> index of the argument that numbers its calls. Segments that differ
            only in that argument are equal.
        compiled: what is compiled, see `Strategy.compiled`.
        once: operator whose results a recomputed block does not compute again.
    """

    mode: FakeTensorMode
    recorder: SegmentRecorder
    gpu: bool
    later: Any = None
    sites: Mapping[Any, int] = field(default_factory=dict)
    compiled: str = ""
    once: Any = None
    _known: dict[Any, tuple[Analysis, SegmentCalls]] = field(default_factory=dict)
    """Key -> analysis, and the calls: keys name objects of theirs by identity, which has to stay theirs."""

    def segment(self, calls: SegmentCalls) -> Analysis:
        """Return the analysis of a segment, cached for all equal segments."""
        key = self._key(calls)
        if key not in self._known:
            self._known[key] = _SegmentRun(self, calls).analysis(), calls
        return self._known[key][0]

    def _key(self, segment: SegmentCalls) -> Any:
        number: dict[fx.Node, int] = {}
        described: list[Any] = []
        for node, spec in (*segment.weights.items(), *segment.inputs.items()):
            number[node] = len(number)
            described.append((spec, node in segment.again))
        for node, value in segment.given.items():
            number[node] = len(number)
            described.append(Spec.of(value) if isinstance(value, Tensor) else str(value))
        calls = []
        for node in segment.nodes:
            target = _function(node.target)
            site = self.sites.get(target[0])
            arguments = [_literal(a, number) for index, a in enumerate(node.args) if index != site]
            calls.append((target, tuple(arguments), _literal(dict(node.kwargs), number)))
            number[node] = len(number)
        return (
            tuple(described),
            tuple(calls),
            tuple(number[node] for node in segment.outputs),
            len(segment.weights),
            segment.loss,
        )


def _function(target: Any) -> tuple[Any, ...]:
    """Return a key by which equal call targets compare equal.

    A `functools.partial` is a new object for each call, so that it is compared by its function and its arguments.
    """
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
    """Marks an input that another segment computes.

    The gradient of such an input ends here. Without this function it would accumulate in the `grad` of a leaf, which
    may cost a copy that the real step does not make.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Once:
    """Call that a recomputed block does not repeat: indices of its kernels and exchanges, and the bytes it saves."""

    kernels: range
    exchanges: range
    saved: int


@dataclass(slots=True)
class _SegmentRun:
    """A run of a segment, forward and backward, that notes what it saves for the backward pass."""

    analyst: Analyst
    segment: SegmentCalls
    _saved: dict[int, int] = field(default_factory=dict)
    _once: list[_Once] = field(default_factory=list)
    _at_last: tuple[int, int] | None = None
    _ready: list[int] = field(default_factory=list)

    def analysis(self) -> Analysis:
        recorder = self.analyst.recorder
        with self.analyst.mode, for_gpu(self.analyst.gpu):
            values: dict[fx.Node, Any] = {node: spec.empty() for node, spec in self.segment.weights.items()}
            leaves = [(index, value) for index, value in enumerate(values.values()) if value.requires_grad]
            values.update({node: _Arrived.apply(spec.empty()) for node, spec in self.segment.inputs.items()})  # type: ignore[no-untyped-call]
            arrived = [values[node] for node in self.segment.inputs]
            weights = [
                values[node] for node in self.segment.weights
            ]  # kept: what is saved must not get their identities
            apart = set(map(_storage_id, weights))
            values.update(self.segment.given)
            for index, leaf in leaves:
                leaf.register_post_accumulate_grad_hook(lambda _, leaf=leaf, index=index: self._complete(leaf, index))
            with recorder:
                begin = recorder.watch()
                results = self._forward(values)
                top, end, at_product = recorder.peak, recorder.live, recorder.at_product
                forward = recorder.take()
                normalised, recorder.normalised = tuple(recorder.normalised), []
                products, recorder.products = recorder.products, 0
                by_storage = {_storage_id(value): index for index, value in enumerate(arrived)}
                made = [self._output(result, by_storage) for result in results]
                inner = self._inside(apart, by_storage, results)
                saved = frozenset(by_storage[storage_id] for storage_id in self._saved if storage_id in by_storage)
                backward, later, most = self._backward(results)
            recomputed = LayerPass()
            if self._at_last is not None:
                # where a compiled segment ends a recomputed block, its product is left out, see `compiling.regions`
                last = at_product if self.analyst.compiled == "all" else None
                recomputed = self._recomputed(forward, *(last or self._at_last))
        del begin
        layer = Layer(
            forward=forward,
            backward=backward,
            weights=later,
            recomputed=recomputed,
            saves=self._at_last is not None,
            inside=inner,
            products=products,
            once=sum(each.saved for each in self._once),
            temporary_forward=top - end,
            temporary_backward=most,
            normalised=normalised,
        )
        return Analysis(layer, tuple(made), saved, tuple(self._ready))

    def _recomputed(self, forward: LayerPass, kernels: int, exchanges: int) -> LayerPass:
        """Return the first `kernels` and `exchanges` of a forward pass without what is computed once."""
        here, there = (
            {index for each in self._once for index in getattr(each, what)} for what in ("kernels", "exchanges")
        )
        return LayerPass(
            tuple(forward.kernels[index] for index in range(kernels) if index not in here),
            tuple(forward.exchanges[index] for index in range(exchanges) if index not in there),
        )

    def _forward(self, values: dict[fx.Node, Any]) -> list[Tensor]:
        recorder, clean = self.analyst.recorder, not any(writes_in_place(node) for node in self.segment.nodes)
        recorder.when = "forward"
        if not clean:
            for node in self.segment.inputs:  # `subgraphs.compiled` clones them too
                values[node] = values[node].clone()
        parts = pieces(self.segment.nodes, self.segment.outputs, self.analyst.compiled)
        last = {argument: part for part in parts for argument in inputs_of(part)}
        with torch.enable_grad(), self._saving():
            for part in parts:
                values.update(self._computed(part, values))
                for argument in inputs_of(part):
                    if last[argument] is part and argument not in self.segment.outputs:
                        values.pop(argument, None)
                for made in outputs_of(part):
                    if made not in last and made not in self.segment.outputs:
                        values.pop(made, None)
        return [values[node] for node in self.segment.outputs]

    def _computed(self, part: GraphRegion | fx.Node, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        if isinstance(part, GraphRegion):
            results = function_of(part)(*(values[node] for node in part.inputs))
            return dict(zip(part.outputs, results, strict=True))
        args, kwargs = fx.node.map_arg((part.args, part.kwargs), lambda argument: values[argument])
        call: Any = on_gpu(part.target) if self.analyst.gpu else part.target  # type: ignore[arg-type]
        if part.target != self.analyst.once:
            return {part: call(*args, **kwargs)}
        recorder, before = self.analyst.recorder, set(self._saved)
        kernels, exchanges = len(recorder.kernels), len(recorder.exchanges)
        result = call(*args, **kwargs)
        saved = sum(size for storage_id, size in self._saved.items() if storage_id not in before)
        ranges = range(kernels, len(recorder.kernels)), range(exchanges, len(recorder.exchanges))
        self._once.append(_Once(*ranges, saved))
        return {part: result}

    @contextmanager
    def _saving(self) -> Iterator[None]:
        recorder = self.analyst.recorder

        def pack(tensor: Tensor) -> Tensor:
            self._saved[_storage_id(tensor)] = tensor.untyped_storage().nbytes()
            self._at_last = len(recorder.kernels), len(recorder.exchanges)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _output(self, result: Any, by_storage: Mapping[int, int]) -> Output:
        storage_id = _storage_id(result)
        held = result.untyped_storage().nbytes()
        alias = by_storage.get(storage_id)
        return Output(Spec.of(result), alias, held, alias is None and storage_id in self._saved)

    def _inside(self, apart: set[int], by_storage: Mapping[int, int], results: Sequence[Tensor]) -> int:
        own = {_storage_id(value) for value in self.segment.given.values() if isinstance(value, Tensor)}
        others = apart | set(by_storage) | {_storage_id(result) for result in results} | own
        return sum(size for storage_id, size in self._saved.items() if storage_id not in others)

    def _backward(self, results: list[Tensor]) -> tuple[LayerPass, LayerPass, int]:
        """Run the backward pass and return (its work, the deferred work on weights, peak bytes).

        The deferred work is empty if nothing is deferred. The peak includes the gradients of the outputs, but not those
        of the weights. If no output requires a gradient, there is no work and the peak is 0.
        """
        recorder = self.analyst.recorder
        roots = [result for result in (results[:1] if self.segment.loss else results) if result.requires_grad]
        if not roots:
            return LayerPass(), LayerPass(), 0
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
        backward, weights = recorder.take(), LayerPass()
        if later is not None:
            later.compute((0, 0))
            weights = recorder.take()
        most = recorder.peak - begin
        recorder.when = "forward"
        return backward, weights, most

    def _add_up(self) -> None:
        """Record one addition for each input that later segments use too: its gradients are accumulated."""
        for node in self.segment.again:
            spec = self.segment.inputs[node]
            if spec.grad:
                elements = spec.bytes // spec.dtype.itemsize
                like = spec.empty().detach()
                kernel = kernel_of(torch.ops.aten.add.Tensor, (like, like), {}, like, "backward")
                assert kernel is not None, elements
                self.analyst.recorder.kernels.append(kernel)

    def _complete(self, tensor: Tensor, index: int) -> None:
        if tensor.grad is not None:  # None if a custom backward function returned no gradient
            self._ready.append(index)
            self.analyst.recorder.forget(tensor.grad)
