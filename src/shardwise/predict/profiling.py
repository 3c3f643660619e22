"""From a workload to its profile: its step is traced once without memory, cut into links, and each kind of link run.

Parameters have no values here and nothing is computed, so that a model may be larger than this machine.
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
from torch.utils.data import default_collate

from shardwise.errors import DataError, WorkloadError
from shardwise.parallel.blocks import repeated_blocks, steady_modules
from shardwise.parallel.cuts import Place, common, from_batch, places
from shardwise.parallel.deferred import WeightGradients, defer_weights
from shardwise.parallel.engine import Position
from shardwise.parallel.keyed import KeyedOperations
from shardwise.parallel.model import evaluating, persistent_buffers, plain_model, untouched
from shardwise.parallel.partitioner import LocalGraph, Replacements
from shardwise.parallel.placement import Sharded, local_shape
from shardwise.parallel.precision import widen_loss
from shardwise.parallel.sections import Section, sections
from shardwise.parallel.tensor import partition
from shardwise.parallel.traced import traced
from shardwise.parallel.values import map_tensors
from shardwise.predict.analysis import Analysis, Analyst, Calls, LinkRecorder, NotedExchange, Spec
from shardwise.predict.kernel import Kernel
from shardwise.predict.profile import Layer, Link, Parameter, Pass, Profile, Value
from shardwise.predict.updating import update_of
from shardwise.strategy import Strategy
from shardwise.workload.data import first_samples
from shardwise.workload.graph import StepGraph, Untraceable, batch_leaves
from shardwise.workload.standin import stand_ins
from shardwise.workload.stored import without_parameters
from shardwise.workload.workload import Workload, call_model

_ALONE = 4
"""Samples that are looked at alone when blocks are looked for, as `parallel.data` does it."""


@dataclass(slots=True)
class Profiles:
    """The profiles of one workload, each made once.

        profiles = Profiles(workload)
        profiles.of(Strategy.parse("tp=2,pp=2"))

    Attributes:
        workload: what is trained.
    """

    workload: Workload
    _known: dict[tuple[Any, ...], Profile] = field(default_factory=dict)

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """The profile that a strategy is predicted from; `batch_size`: in place of the workload's.

        Raises:
            StrategyError: the batch does not divide.
            WorkloadError: the step cannot be traced, and the strategy has tp.
        """
        size = batch_size or self.workload.batch_size
        strategy = strategy.for_batch(size)
        key = (
            strategy.tp,
            strategy.sp,
            size // strategy.replicas // strategy.microbatches,
            strategy.precision or self.workload.precision,
            strategy.schedule == "zero-bubble",
        )
        if key not in self._known:
            tp, sp, microbatch, precision, split = key
            self._known[key] = profile(
                self.workload, tp=tp, sp=sp, microbatch=microbatch, precision=precision, split=split
            )
        return self._known[key]


def profile(
    workload: Workload, *, tp: int = 1, sp: int = 0, microbatch: int, precision: str = "", split: bool = False
) -> Profile:
    """What one microbatch of a workload needs on one device.

    Args:
        workload: what is trained; its model is built without memory for parameters.
        tp: tensor-parallel workers.
        sp: 1: activations between sharded layers are cut along the sequence.
        microbatch: samples.
        precision: `float32` or `bf16`; empty: the workload's.
        split: gradients of weights apart from those of inputs, as a zero-bubble pipeline computes them.

    Raises:
        WorkloadError: the model cannot be built, or not be traced though `tp` is above 1.
        DataError: the dataset is empty.
    """

    def profiler() -> _Profiler:
        return _Profiler(workload, tp, sp, microbatch, precision or workload.precision, split)

    for build in (_on_meta, _without_parameters):
        model = build(workload)
        if model is not None:
            try:
                return profiler().profile(model)
            except Untraceable:
                continue
    with torch.random.fork_rng():
        return profiler().profile_with_values(plain_model(workload))


def _on_meta(workload: Workload) -> nn.Module | None:
    """The module without memory and without random numbers; None where its factory computes with what it makes."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                model = plain_model(workload)
        except (RuntimeError, NotImplementedError, ValueError):
            return None
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # their values make no difference, but they must have some
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    return model if all(parameter.is_meta for parameter in model.parameters()) else None


def _without_parameters(workload: Workload) -> nn.Module:
    with torch.random.fork_rng(), without_parameters():
        return plain_model(workload)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their first names, those of a module together."""
    known: dict[str, Tensor] = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return {name: known[name] for name in model.state_dict() if name in known}


def _batch(workload: Workload, samples: int) -> Any:
    """A batch of so many samples: the first of the dataset, again from the start where it has fewer."""
    found = first_samples(workload.dataset, samples)
    if found is None:
        raise WorkloadError(
            f"the dataset of workload {workload.name!r} can be read only once, and a prediction looks at a batch: "
            "give an iterable whose iter() starts anew"
        )
    if not found:
        raise DataError(f"the dataset of workload {workload.name!r} is empty: there is nothing to train on")
    return (workload.collate or default_collate)([found[index % len(found)] for index in range(samples)])


@dataclass(slots=True)
class _Traced:
    """A step in all the forms that its analysis needs."""

    local: LocalGraph
    found: list[Place]
    parts: list[Section]


class _Profiler:
    def __init__(self, workload: Workload, tp: int, sp: int, microbatch: int, precision: str, split: bool) -> None:
        self.workload, self.tp, self.sp, self.precision = workload, tp, sp, precision
        self.samples, self.split = microbatch, split
        self.recorder = LinkRecorder()
        self.exchange = NotedExchange(tp, self.recorder)
        position = Position(seed=workload.seed, samples=microbatch, counted=microbatch)
        self.keyed = KeyedOperations(position, self.exchange, None)
        self.weights = WeightGradients()

    def profile(self, model: nn.Module) -> Profile:
        """Of a model without values. Raises Untraceable."""
        data = _batch(self.workload, self.samples)
        return self._cut(model, traced(self.workload, model, data), data)

    def profile_with_values(self, model: nn.Module) -> Profile:
        """Of a model that is known not to be traceable as a whole."""
        data = _batch(self.workload, self.samples)
        try:
            return self._cut(model, traced(self.workload, model, data), data)
        except Untraceable as error:
            if self.tp > 1:
                raise
            return self._whole(model, data, str(error))

    # ---- a traced step ----------------------------------------------------------------------------------------------

    def _cut(self, model: nn.Module, step: StepGraph, data: Any) -> Profile:
        named = dict(model.named_parameters())
        trained = frozenset(name for name, parameter in named.items() if parameter.requires_grad)
        cut = self._cut_at_places(model, step, data, named, trained)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given = _given(step, data, mode)
        tensors = _tensors(model)
        specs = _specs(cut.local, tensors)
        analyst = Analyst(
            mode,
            self.recorder,
            self.precision == "bf16",
            self.weights if self.split else None,
            {self.keyed.dropout: 2, self.keyed.attention: 7},
        )
        chain = _Chain(analyst, cut, given, specs)
        chain.run()
        used = _used(cut.parts)
        parameters = tuple(self._parameter(name, tensor, cut.local, used) for name, tensor in tensors.items())
        index = {parameter.name: number for number, parameter in enumerate(parameters)}
        return self._finished(
            model,
            data,
            links=tuple(chain.links),
            parameters=parameters,
            values=tuple(chain.values()),
            ready=tuple(index[name] for name in chain.ready),
            constants=sum(t.numel() * t.element_size() for t in step.constants.values()),
        )

    def _cut_at_places(
        self, model: nn.Module, step: StepGraph, data: Any, named: Mapping[str, nn.Parameter], trained: frozenset[str]
    ) -> _Traced:
        local = self._partitioned(step, trained)
        found = places(local, named)
        if self.workload.evaluation is not None:
            evaluation = traced(self.workload, model, data, training=False)
            found = common(found, places(self._partitioned(evaluation, trained, local), named))
        if self.split:
            defer_weights(local.graph, self.weights, step.tensors)
        if self.precision == "bf16":
            widen_loss(local.graph, torch.device("cpu"))
        return _Traced(local, found, sections(local, [place.position for place in found]))

    def _partitioned(self, step: StepGraph, trained: frozenset[str], first: LocalGraph | None = None) -> LocalGraph:
        keyed = self.keyed
        local, _ = partition(
            step,
            self.exchange,
            Replacements(keyed.dropout, keyed.attention, self._batch_norm, keyed.opaque),
            trained=trained,
            sequence=bool(self.sp),
            placements=None if first is None else first.placements,
            summed=None if first is None else first.summed,
        )
        return local

    def _batch_norm(self, x: Tensor, *others: Any) -> Tensor:
        """Notes a batch norm, whose statistics are those of all replicas."""
        self.recorder.normalised.append(int(x.shape[1]))
        return self.keyed.batch_norm(x, *others)

    def _parameter(self, name: str, tensor: Tensor, local: LocalGraph, used: Mapping[str, Sequence[int]]) -> Parameter:
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
        )

    # ---- a module that cannot be traced -----------------------------------------------------------------------------

    def _whole(self, model: nn.Module, data: Any, why: str) -> Profile:
        """The module as one link, from one pass through it on real data."""
        tensors = _tensors(model)
        parameters = tuple(
            Parameter(
                name,
                tuple(tensor.shape),
                tensor.element_size(),
                (0,),
                trained=isinstance(tensor, nn.Parameter) and tensor.requires_grad,
                buffer=not isinstance(tensor, nn.Parameter),
            )
            for name, tensor in tensors.items()
        )
        layer, ready = self._run(model, data)
        index = {parameter.name: number for number, parameter in enumerate(parameters)}
        return replace(
            self._finished(
                model,
                data,
                links=(Link(layer),),
                parameters=parameters,
                values=(),
                ready=tuple(index[name] for name in ready),
                constants=0,
            ),
            cut=False,
            notes=(why,),
        )

    def _run(self, model: nn.Module, data: Any) -> tuple[Layer, list[str]]:
        """One forward and one backward pass, noted."""
        recorder, saved, ready = self.recorder, {}, []
        own = {int(t.untyped_storage()._cdata) for t in (*model.parameters(), *model.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            place = int(tensor.untyped_storage()._cdata)
            if place not in own:
                saved[place] = tensor.untyped_storage().nbytes()
            return tensor

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, name=name: ready.append(name)
                )
        with untouched(model), torch.random.fork_rng(), recorder:
            recorder.watch()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = self.workload.loss(self._called(model, data), data)
            top, end = recorder.peak, recorder.live
            forward = recorder.take()
            recorder.when = "backward"
            begin = recorder.watch()
            loss.backward()  # type: ignore[no-untyped-call]
            backward, most = recorder.take(), recorder.peak - begin
        layer = Layer(
            forward=forward,
            backward=backward,
            recomputed=forward,
            inside=sum(saved.values()),
            temporary_forward=top - end,
            temporary_backward=most,
        )
        return layer, ready

    def _called(self, model: nn.Module, data: Any) -> Any:
        if self.precision != "bf16":
            return call_model(model, self.workload.inputs(data))
        with torch.autocast("cpu", torch.bfloat16):
            output = call_model(model, self.workload.inputs(data))
        return map_tensors(lambda tensor: tensor.float() if tensor.dtype == torch.bfloat16 else tensor, output)

    # ---- what both have ---------------------------------------------------------------------------------------------

    def _finished(self, model: nn.Module, data: Any, **found: Any) -> Profile:
        parameters: tuple[Parameter, ...] = found["parameters"]
        return Profile(
            name=self.workload.name,
            tp=self.tp,
            sp=self.sp,
            microbatch=self.samples,
            precision=self.precision,
            batch_size=self.workload.batch_size,
            blocks=self._blocks(model, parameters),
            update=update_of(self.workload),
            weighted=self.workload.weight is not None,
            clipped=self.workload.clip_norm is not None,
            split=self.split,
            batch_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(data) if isinstance(t, Tensor)),
            **found,
        )

    def _blocks(self, model: nn.Module, parameters: Sequence[Parameter]) -> tuple[tuple[int, ...], ...]:
        """The parameters of the repeated blocks that `fully_shard` and recomputation take one after the other."""
        samples = first_samples(self.workload.dataset, _ALONE) or []
        collate = self.workload.collate or default_collate
        batches = [_batch(self.workload, self.samples), *(collate([sample]) for sample in samples)]
        passes = [partial(self._look, model, batch) for batch in batches]
        index = {parameter.name: number for number, parameter in enumerate(parameters)}
        with evaluating(model), untouched(model), torch.random.fork_rng(), torch.no_grad():
            blocks = repeated_blocks(model, steady_modules(model, passes))
        names = {tensor: name for name, tensor in model.named_parameters()}
        return tuple(tuple(index[names[tensor]] for tensor in block.parameters()) for block in blocks)

    def _look(self, model: nn.Module, batch: Any) -> None:
        with stand_ins(model, batch) as (mode, given):
            if mode is None:
                self._called(model, given)
                return
            with mode:
                self._called(model, given)


def _given(step: StepGraph, data: Any, mode: FakeTensorMode) -> dict[str, Any]:
    """The batch and the module's constants without their data, by placeholder."""
    leaves = dict(zip(step.leaves, batch_leaves(data), strict=True))
    return {
        name: mode.from_tensor(value.detach()) if isinstance(value, Tensor) else value
        for name, value in {**leaves, **step.constants}.items()
    }


def _specs(local: LocalGraph, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Spec]:
    """How the parameters and buffers of a graph lie on one worker, by placeholder."""
    found = {}
    for node in local.graph.nodes:
        name = local.step.tensors.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            tensor = tensors[name]
            like = torch.empty(tuple(node.meta["shape"]), device="meta")
            grad = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            found[node] = Spec(tuple(like.shape), tuple(like.stride()), tensor.dtype, grad)
    return found


def _used(parts: Sequence[Section]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        for name in part.tensors:
            found.setdefault(name, []).append(number)
    return found


class _Chain:
    """The links of a step, analysed one after the other."""

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
        self.links: list[Link] = []
        self._ready_of: list[list[str]] = []
        self._from_batch: dict[fx.Node, tuple[Kernel, ...]] = {}
        self._layers: dict[tuple[int, tuple[Kernel, ...]], Layer] = {}
        self.ready: list[str] = []

    def run(self) -> None:
        """Analyses all of them."""
        parts, found = self._cut.parts, self._cut.found
        for number, part in enumerate(parts):
            for node in part.inputs:
                self._uses.setdefault(node, []).append(number)
        self._compute()
        for number, part in enumerate(parts):
            analysis = self._analysed(number, part, loss=number == len(parts) - 1)
            layer = self._with_batch(part, analysis.layer)
            self.links.append(Link(layer, found[number - 1].bytes if number else 0))
        self._order()

    def values(self) -> Iterable[Value]:
        """What links hand to each other."""
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
        """The layer of a link with what comes from the batch alone, computed by whoever needs it first."""
        needed = [node for node in part.nodes if node in self._from_batch]
        kernels = tuple(kernel for node in needed for kernel in self._from_batch.pop(node))
        if not kernels:
            return layer
        key = id(layer), kernels
        if key not in self._layers:
            forward = Pass(kernels + layer.forward.kernels, layer.forward.exchanges)
            self._layers[key] = replace(layer, forward=forward)
        return self._layers[key]

    def _compute(self) -> None:
        """Computes what comes from the batch alone."""
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
        analysis = self._analyst.link(Calls(own, weights, given, inputs, outputs, again, loss))
        arrived = list(inputs)
        for index in analysis.saved:
            self._keep(arrived[index], number)
        for node, output in zip(outputs, analysis.outputs, strict=True):
            self._lies[node] = output.spec
            self._made.setdefault(node, number)
            self._root[node] = node if output.alias is None else self._root[arrived[output.alias]]
            self._held[node] = 0 if output.alias is not None else output.held
            if output.saved:
                self._keep(node, number)
        names = self._cut.local.step.tensors
        self._ready_of.append([names[list(weights)[index].name] for index in analysis.ready])
        return analysis

    def _keep(self, node: fx.Node, link: int) -> None:
        self._saves.setdefault(self._root[node], []).append(link)

    def _order(self) -> None:
        """Gradients of the whole step in the order in which they are complete: with the first use of each."""
        first: dict[str, int] = {}
        for number, names in enumerate(self._ready_of):
            for name in names:
                first.setdefault(name, number)
        for number in reversed(range(len(self._ready_of))):
            self.ready += [name for name in self._ready_of[number] if first[name] == number]
