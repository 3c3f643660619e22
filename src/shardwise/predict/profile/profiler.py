"""Profiler: traces a workload's step once without memory, cuts it into segments, and analyses each kind of segment.

Parameters have no values here and nothing is computed, so that a model may be larger than this machine's memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from shardwise.parallel.check import TensorDegrees
from shardwise.parallel.compiling.regions import write_elsewhere
from shardwise.parallel.engine import Position
from shardwise.parallel.graph.loss_pieces import cut_loss
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.operators.graph_operators import GraphOperators
from shardwise.parallel.pipeline.cut_points import CutPoint, common, find_cut_points, from_batch
from shardwise.parallel.pipeline.subgraphs import Section, sections
from shardwise.parallel.pipeline.weight_gradients import WeightGradients, defer_weights
from shardwise.parallel.state.build_model import untouched
from shardwise.parallel.tensor.overlap import overlap
from shardwise.parallel.tensor.partition import partition
from shardwise.parallel.tensor.partitioner import LocalGraph, Replacements
from shardwise.parallel.tensor.placement import Sharded, local_shape
from shardwise.predict.profile.deepen import deepened
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.meta_model import Model, batch, builds, tensors_of, with_values
from shardwise.predict.profile.profile import Layer, LayerPass, Parameter, Profile, Segment, Value
from shardwise.predict.profile.segment_recorder import (
    Analysis,
    Analyst,
    RecordedExchange,
    SegmentCalls,
    SegmentRecorder,
    Spec,
)
from shardwise.predict.runtime.runtime import own_runtime
from shardwise.strategy import Strategy
from shardwise.workload.losses import losses_of, total
from shardwise.workload.own_step import run_step
from shardwise.workload.precision import Kept, calls_computing, for_gpu, kept_of
from shardwise.workload.trace.graph import StepGraph, Untraceable, batch_leaves
from shardwise.workload.trace.repeated_layers import repeated_layers
from shardwise.workload.workload import Workload


@dataclass(slots=True)
class Profiles:
    """Cache of a workload's profiles. Each profile is made once, from models that are built and traced once.

        profiles = Profiles(workload)
        profiles.of(Strategy.parse("tp=2,pp=2"))

    Attributes:
        workload: the workload to profile.
        device: kind of device, `gpu` or `cpu`.
    """

    workload: Workload
    device: str = "gpu"
    _known: dict[tuple[Any, ...], Profile] = field(default_factory=dict)
    _models: _Models | None = None

    @property
    def software(self) -> None:
        """Return None: the workload is trained by Shardwise's own program."""

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return the profile that a strategy is predicted from.

        Args:
            strategy: the strategy.
            batch_size: global batch size; 0 selects the workload's.

        Raises:
            StrategyError: the batch does not divide into the strategy's microbatches.
            WorkloadError: the strategy has tp above 1, but the step cannot be traced.
        """
        size = batch_size or self.workload.batch_size
        strategy = strategy.for_batch(size)
        key = (
            strategy.tp,
            strategy.sp,
            size // strategy.replicas // strategy.microbatches,
            strategy.precision_of(self.workload.precision),
            *strategy.kernel_options,
        )
        if key not in self._known:
            self._models = self._models or _Models(self.workload, self.device)
            self._known[key] = self._models.profile(*key)
        return self._known[key]

    def layer_class(self) -> str:
        """Return the name of the class of the module's repeated layers; empty if it has none."""
        self._models = self._models or _Models(self.workload, self.device)
        return self._models.layer_class()

    def tensor_degrees(self) -> TensorDegrees:
        """Return the degrees of tensor parallelism that the model allows.

        Raises:
            Untraceable: the step cannot be traced.
        """
        self._models = self._models or _Models(self.workload, self.device)
        return self._models.tensor_degrees()


def profile(
    workload: Workload,
    *,
    tp: int = 1,
    sp: int = 0,
    microbatch: int,
    precision: str = "",
    split: bool = False,
    compiled: str = "",
    loss_pieces: int = 0,
    gathers_again: bool = False,
    device: str = "gpu",
) -> Profile:
    """Profile one microbatch of a workload on one device.

    Args:
        workload: the workload to profile; its model is built without memory for parameters.
        tp: degree of tensor parallelism.
        sp: 1 shards activations between sharded layers along the sequence.
        microbatch: samples of the microbatch.
        precision: `float32` or `bf16`; empty selects the workload's.
        split: whether gradients of weights and of inputs are computed in passes of their own, as in a zero-bubble
            pipeline.
        compiled: what is compiled, see `Strategy.compiled`.
        loss_pieces: see `Strategy.loss_pieces`.
        gathers_again: see `Strategy.gathers_again`.
        device: kind of device, `gpu` or `cpu`.

    Raises:
        WorkloadError: the model cannot be built, or `tp` is above 1 and the model cannot be traced.
        DataError: the dataset is empty.
    """
    models = _Models(workload, device)
    kind = precision or workload.precision
    return models.profile(tp, sp, microbatch, kind, split, compiled, loss_pieces, gathers_again)


class _Models:
    """Builds of a model to profile, the fastest first. A build that turned out to be untraceable is not tried again."""

    def __init__(self, workload: Workload, device: str) -> None:
        self._workload, self._device = workload, device
        self._builds = builds(workload, device)
        self._model: Model | None = next(self._builds)
        self._recordings: dict[tuple[Any, ...], _Recording] = {}

    def profile(
        self, tp: int, sp: int, samples: int, precision: str, split: bool, compiled: str, *options: Any
    ) -> Profile:
        """Profile the first build that can be traced, else the model with real values; see `profile` above.

        Profiles of equal sizes share what is known of equal segments.
        """
        sizes = tp, samples, precision, split, compiled
        made = partial(_Recording.of, self._workload.seed, self._device, tp, samples, split, compiled)
        while self._model is not None:
            if sizes not in self._recordings:
                self._recordings[sizes] = made()
            try:
                return _Profiler(self._model, self._device, self._recordings[sizes], *sizes, sp, *options).profile()
            except Untraceable:
                self._model = next(self._builds, None)
                self._recordings.clear()
        model = with_values(self._workload, self._device)
        # with a recording of its own, which keeps the model alive
        return _Profiler(model, self._device, made(), *sizes, sp, *options).profile_with_values()

    def layer_class(self) -> str:
        """See `Profiles.layer_class`."""
        model = self._model or with_values(self._workload, self._device)
        layers = repeated_layers(model.module)
        return "" if layers is None else type(layers[0]).__name__

    def tensor_degrees(self) -> TensorDegrees:
        """See `Profiles.tensor_degrees`."""
        model = self._model or with_values(self._workload, self._device)
        with model.short() as module:
            return TensorDegrees(model.any_step(), dict(module.named_parameters()))


@dataclass(slots=True)
class _Traced:
    """A partitioned step: the graph of one worker, its cut points, and its segments as subgraphs."""

    local: LocalGraph
    found: list[CutPoint]
    parts: list[Section]


@dataclass(frozen=True, slots=True)
class _Recording:
    """All that segments of one size are run with, and what is known of those that ran.

    Attributes:
        exchange: the collectives of tensor parallelism.
        operators: the operations of ours.
        weights: the weight gradients that are put off.
        analyst: the analyst, with its recorder.
    """

    exchange: RecordedExchange
    operators: GraphOperators
    weights: WeightGradients
    analyst: Analyst

    @classmethod
    def of(cls, seed: int, device: str, tp: int, samples: int, split: bool, compiled: str) -> _Recording:
        """Build an empty recording; the arguments are as of `profile`."""
        recorder, weights = SegmentRecorder(cpu=device == "cpu"), WeightGradients()
        exchange = RecordedExchange(tp, recorder)
        operators = GraphOperators(Position(seed=seed, samples=samples, counted=samples), exchange, None)
        analyst = Analyst(
            FakeTensorMode(allow_non_fake_inputs=True),
            recorder,
            device == "gpu",
            weights if split else None,
            {operators.dropout: 2, operators.draw: 1, operators.attention: 7},
            compiled,
            operators.loss_in_pieces,
        )
        return cls(exchange, operators, weights, analyst)


class _Profiler:
    def __init__(
        self,
        model: Model,
        device: str,
        recording: _Recording,
        tp: int,
        microbatch: int,
        precision: str,
        split: bool,
        compiled: str,
        sp: int,
        loss_pieces: int,
        gathers_again: bool,
    ) -> None:
        self.model, self.workload, self.device = model, model.workload, device
        self.tp, self.sp, self.precision = tp, sp, precision
        self.samples, self.split, self.compiled, self.loss_pieces = microbatch, split, compiled, loss_pieces
        self.gathers_again = gathers_again
        self.exchange, self.operators, self.weights = recording.exchange, recording.operators, recording.weights
        self.analyst, self.recorder = recording.analyst, recording.analyst.recorder

    def profile(self) -> Profile:
        """Profile a model without values. Raises Untraceable if its step cannot be traced."""
        with self.model.short() as module:
            found = self._cut(module)
        if self.model.layers is not None:
            longer = deepened(found, self.model.prefixes())
            if longer is None:  # equal layers that the step uses in different ways
                self.model.lengthen()
                return self.profile()
            found = longer
        return self._with_blocks(found)

    def profile_with_values(self) -> Profile:
        """Profile a model with real values, as a single segment if its step cannot be traced.

        Raises:
            Untraceable: the step cannot be traced, but tp is above 1.
        """
        try:
            return self._with_blocks(self._cut(self.model.module))
        except Untraceable as error:
            if self.tp > 1:
                raise
            return self._with_blocks(self._whole(self.model.module, str(error)))

    def _with_blocks(self, found: Profile) -> Profile:
        index = {parameter.name: number for number, parameter in enumerate(found.parameters)}
        blocks = self.model.blocks(self.samples)
        return replace(found, blocks=tuple(tuple(index[name] for name in names) for names in blocks))

    # ---- a traced step ----------------------------------------------------------------------------------------------

    def _cut(self, model: nn.Module) -> Profile:
        data, step = batch(self.workload, self.samples), self.model.step(self.samples, self.precision)
        named = dict(model.named_parameters())
        trained = frozenset(name for name, parameter in named.items() if parameter.requires_grad)
        cut = self._cut_at_cut_points(step, named, trained)
        given = _given(step, data, self.analyst.mode)
        tensors = tensors_of(model)
        specs = _specs(cut.local, tensors)
        chain = _Chain(self.analyst, cut, given, specs)
        chain.run()
        used = _used(cut.parts)
        kept = self._kept(model).names
        parameters = tuple(
            self._parameter(name, tensor, cut.local, used, kept=name in kept) for name, tensor in tensors.items()
        )
        index = {parameter.name: number for number, parameter in enumerate(parameters)}
        return self._finished(
            data,
            segments=tuple(chain.segments),
            parameters=parameters,
            values=tuple(chain.values()),
            ready=tuple(index[name] for name in chain.ready),
            losses=len(step.losses),
        )

    def _cut_at_cut_points(
        self, step: StepGraph, named: Mapping[str, nn.Parameter], trained: frozenset[str]
    ) -> _Traced:
        local = self._partitioned(step, trained)
        cut_loss(local, self.loss_pieces, self.operators.loss_in_pieces)
        if not self.split:
            overlap(local.graph, step.tensors, direct=bool(self.compiled), again=self.gathers_again)
        found = find_cut_points(local, named)
        if self.workload.evaluations:
            found = common(found, self._evaluated(named, trained, local))
        if self.split:
            defer_weights(local.graph, self.weights, step.tensors)
        if self.compiled:
            write_elsewhere(local.graph)
        return _Traced(local, found, sections(local, [cut_point.position for cut_point in found]))

    def _evaluated(
        self, named: Mapping[str, nn.Parameter], trained: frozenset[str], local: LocalGraph
    ) -> Sequence[CutPoint]:
        """Return the cut points of the evaluation graph, cached: they are the same for any number of samples."""
        known, key = self.model.evaluated, (self.tp, self.sp)
        if key not in known:
            known[key] = find_cut_points(self._partitioned(self.model.evaluation(self.samples), trained, local), named)
        return known[key]

    def _partitioned(self, step: StepGraph, trained: frozenset[str], first: LocalGraph | None = None) -> LocalGraph:
        operators = self.operators
        local, _ = partition(
            step,
            self.exchange,
            Replacements(operators.dropout, operators.draw, operators.attention, self._batch_norm, operators.opaque),
            trained=trained,
            sequence=bool(self.sp),
            placements=None if first is None else first.placements,
            summed=None if first is None else first.summed,
        )
        return local

    def _batch_norm(self, x: Tensor, *others: Any) -> Tensor:
        """Run a batch norm and record its channels: in training its statistics are computed over all replicas."""
        self.recorder.normalised.append(int(x.shape[1]))
        return self.operators.batch_norm(x, *others)

    def _parameter(
        self, name: str, tensor: Tensor, local: LocalGraph, used: Mapping[str, Sequence[int]], *, kept: bool
    ) -> Parameter:
        placement = local.placements.get(name)
        return Parameter(
            name,
            local_shape(tuple(tensor.shape), placement, self.tp) if placement is not None else tuple(tensor.shape),
            tensor.element_size(),
            tuple(used.get(name, (0,))),
            trained=isinstance(tensor, nn.Parameter) and tensor.requires_grad,
            cut=isinstance(placement, Sharded),
            summed=name in local.summed,
            buffer=not isinstance(tensor, nn.Parameter),
            kept=kept,
        )

    # ---- a module that cannot be traced -----------------------------------------------------------------------------

    def _whole(self, model: nn.Module, why: str) -> Profile:
        """Profile a module that cannot be traced as a single segment, from a step on real data."""
        data, tensors = batch(self.workload, self.samples), tensors_of(model)
        kept = self._kept(model).names
        parameters = tuple(
            Parameter(
                name,
                tuple(tensor.shape),
                tensor.element_size(),
                (0,),
                trained=isinstance(tensor, nn.Parameter) and tensor.requires_grad,
                buffer=not isinstance(tensor, nn.Parameter),
                kept=name in kept,
            )
            for name, tensor in tensors.items()
        )
        layer, ready, losses = self._run(model, data)
        index = {parameter.name: number for number, parameter in enumerate(parameters)}
        return replace(
            self._finished(
                data,
                segments=(Segment(layer),),
                parameters=parameters,
                values=(),
                ready=tuple(index[name] for name in ready),
                losses=losses,
            ),
            cut=False,
            notes=(why,),
        )

    def _run(self, model: nn.Module, data: Any) -> tuple[Layer, list[str], int]:
        """Run one forward and one backward pass and record them.

        Returns:
            The layer, names of the trained parameters in the order in which their gradients become complete, and the
            number of losses.
        """
        recorder, saved, ready = self.recorder, {}, []
        own = {int(t.untyped_storage()._cdata) for t in (*model.parameters(), *model.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            storage = int(tensor.untyped_storage()._cdata)
            if storage not in own:
                saved[storage] = tensor.untyped_storage().nbytes()
            return tensor

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, name=name: ready.append(name)
                )
        with untouched(model), random_state_kept(), recorder:
            recorder.watch()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                losses = self._losses(model, data)
                loss = total(losses)
            top, end = recorder.peak, recorder.live
            forward = recorder.take()
            products, recorder.products = recorder.products, 0
            recorder.when = "backward"
            begin = recorder.watch()
            loss.backward()  # type: ignore[no-untyped-call]
            backward, most = recorder.take(), recorder.peak - begin
        layer = Layer(
            forward=forward,
            backward=backward,
            recomputed=forward,
            inside=sum(saved.values()),
            products=products,
            temporary_forward=top - end,
            temporary_backward=most,
        )
        return layer, ready, len(losses)

    def _losses(self, model: nn.Module, data: Any) -> dict[str, Tensor]:
        if self.workload.step is None:
            return losses_of(self.workload, model, self.model.called(data, self.precision), data)
        kept = self._kept(model)
        with for_gpu(self.device == "gpu"), calls_computing(self.precision, model, model.parameters, kept=kept):
            return run_step(self.workload, model, data)

    def _kept(self, model: nn.Module) -> Kept:
        return kept_of(self.precision, model, self.workload.float32)

    # ---- either way -------------------------------------------------------------------------------------------------

    def _finished(self, data: Any, **found: Any) -> Profile:
        return Profile(
            name=self.workload.name,
            tp=self.tp,
            sp=self.sp,
            microbatch=self.samples,
            precision=self.precision,
            runtime=own_runtime(self.precision, self.device),
            device=self.device,
            batch_size=self.workload.batch_size,
            update=self.model.update(),
            weighted=self.workload.weight is not None,
            clipped=self.workload.clip_norm is not None,
            split=self.split,
            compiled=self.compiled,
            loss_pieces=self.loss_pieces,
            gathers_again=self.gathers_again,
            batch_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(data) if isinstance(t, Tensor)),
            **found,
        )


def _given(step: StepGraph, data: Any, mode: FakeTensorMode) -> dict[str, Any]:
    """Return the batch and the module's constants as fake tensors, by placeholder name."""
    leaves = dict(zip(step.leaves, batch_leaves(data), strict=True))
    return {
        name: mode.from_tensor(value.detach()) if isinstance(value, Tensor) else value
        for name, value in {**leaves, **step.constants}.items()
    }


def _specs(local: LocalGraph, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Spec]:
    """Return how each parameter and buffer lies in the memory of one worker, by placeholder."""
    found = {}
    for node in local.graph.nodes:
        name = local.step.tensors.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            tensor = tensors[name]
            like = torch.empty(tuple(node.meta["shape"]), device="meta")
            grad = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            dtype = torch.bfloat16 if name in local.step.narrow else tensor.dtype
            found[node] = Spec(tuple(like.shape), tuple(like.stride()), dtype, grad)
    return found


def _used(parts: Sequence[Section]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        for name in part.tensors:
            found.setdefault(name, []).append(number)
    return found


class _Chain:
    """Segments of a step, analysed one after the other."""

    def __init__(self, analyst: Analyst, cut: _Traced, given: Mapping[str, Any], specs: Mapping[fx.Node, Spec]) -> None:
        self._analyst, self._cut, self._specs = analyst, cut, specs
        self._batch = from_batch(cut.local)
        placeholders = {node.name: node for node in cut.local.graph.nodes if node.op == "placeholder"}
        self._known: dict[fx.Node, Any] = {
            placeholders[name]: value for name, value in given.items() if name in placeholders
        }
        self._lies: dict[fx.Node, Spec] = {}
        self._held: dict[fx.Node, int] = {}
        self._root: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, int] = {}
        self._uses: dict[fx.Node, list[int]] = {}
        self._saves: dict[fx.Node, list[int]] = {}
        self.segments: list[Segment] = []
        self._ready_of: list[list[str]] = []
        self._from_batch: dict[fx.Node, tuple[Kernel, ...]] = {}
        self._layers: dict[tuple[int, tuple[Kernel, ...]], Layer] = {}
        self._held_constants: set[str] = set()
        self.ready: list[str] = []

    def run(self) -> None:
        """Analyse all segments; fills `segments` and `ready`."""
        parts, found = self._cut.parts, self._cut.found
        for number, part in enumerate(parts):
            for node in part.inputs:
                self._uses.setdefault(node, []).append(number)
        self._compute()
        for number, part in enumerate(parts):
            analysis = self._analysed(number, part, loss=number == len(parts) - 1)
            layer = self._with_batch(part, analysis.layer)
            message = found[number - 1].bytes if number else 0
            self.segments.append(Segment(layer, message, self._constants(part)))
        self._order()

    def values(self) -> Iterable[Value]:
        """Yield the tensors that segments hand to each other, after `run`."""
        for node, made in self._made.items():
            users = self._uses.get(node, [])
            if not users:
                continue
            shape, dtype = node.meta["shape"], node.meta["dtype"]
            message = dtype.itemsize
            for size in shape:
                message *= size
            yield Value(
                message,
                self._held[node],
                made,
                tuple(users),
                tuple(sorted(set(self._saves.get(node, [])))),
                bool(node.meta["grad"]),
            )

    def _with_batch(self, part: Section, layer: Layer) -> Layer:
        """Add the kernels that depend on the batch alone to the forward pass of the segment that needs them first."""
        needed = [node for node in part.nodes if node in self._from_batch]
        kernels = tuple(kernel for node in needed for kernel in self._from_batch.pop(node))
        if not kernels:
            return layer
        key = id(layer), kernels
        if key not in self._layers:
            forward = LayerPass(kernels + layer.forward.kernels, layer.forward.exchanges)
            self._layers[key] = replace(layer, forward=forward)
        return self._layers[key]

    def _constants(self, part: Section) -> int:
        """Return the bytes of the module's constants that a segment is the first to use."""
        held = self._cut.local.step.constants
        new = [node.name for node in part.given if node.name in held and node.name not in self._held_constants]
        self._held_constants.update(new)
        return sum(held[name].numel() * held[name].element_size() for name in new)

    def _compute(self) -> None:
        """Run and record the nodes that depend on the batch and on constants alone."""
        recorder = self._analyst.recorder
        with self._analyst.mode, recorder, torch.no_grad():
            for node in self._cut.local.graph.nodes:
                if node.op == "call_function" and node in self._batch:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: self._known[a])
                    self._known[node] = node.target(*args, **kwargs)
                    self._from_batch[node] = recorder.take().kernels

    def _analysed(self, number: int, part: Section, *, loss: bool) -> Analysis:
        own = [node for node in part.nodes if node not in self._batch]
        arguments = list(dict.fromkeys(argument for node in own for argument in node.all_input_nodes))
        weights = {node: self._specs[node] for node in arguments if node in self._specs}
        given = {node: self._known[node] for node in arguments if node in self._known and node not in weights}
        inputs = {node: self._lies[node] for node in part.inputs if node in self._lies}
        outputs = [node for node in part.outputs if node not in self._batch]
        again = frozenset(node for node in inputs if self._uses[node][-1] > number)
        analysis = self._analyst.segment(SegmentCalls(own, weights, given, inputs, outputs, again, loss))
        arrived = list(inputs)
        for index in analysis.saved:
            self._save(arrived[index], number)
        for node, output in zip(outputs, analysis.outputs, strict=True):
            self._lies[node] = output.spec
            self._made.setdefault(node, number)
            self._root[node] = node if output.alias is None else self._root[arrived[output.alias]]
            self._held[node] = 0 if output.alias is not None else output.held
            if output.saved:
                self._save(node, number)
        names = self._cut.local.step.tensors
        self._ready_of.append([names[list(weights)[index].name] for index in analysis.ready])
        return analysis

    def _save(self, node: fx.Node, segment: int) -> None:
        self._saves.setdefault(self._root[node], []).append(segment)

    def _order(self) -> None:
        """Order the parameters by when their gradients become complete: in the backward pass of their first use."""
        first: dict[str, int] = {}
        for number, names in enumerate(self._ready_of):
            for name in names:
                first.setdefault(name, number)
        for number in reversed(range(len(self._ready_of))):
            self.ready += [name for name in self._ready_of[number] if first[name] == number]
