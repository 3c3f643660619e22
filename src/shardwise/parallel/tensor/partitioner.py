"""Walk through the operations of a step and make their inputs fit: the machinery that the rules are written with.

See `tensor` for an overview of tensor parallelism.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from shardwise.parallel.tensor.aliasing import changed_under_another_name, roots, writes_in_place
from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.placement import PARTIAL, REPLICATED, Origin, Partial, Placement, Sharded, local_shape
from shardwise.workload.trace.graph import StepGraph, modules_around, outside_model

Labels = tuple[str | None, ...]
"""One label per dimension of a value.

Dimensions with equal labels are sharded alike; None marks one that cannot be sharded.
"""


Rule = Callable[["Partitioner", fx.Node, list[Any], dict[str, Any]], Any]
"""Signature of a rule: (partitioner, node of the step, args, kwargs) -> a Value, a tuple of Values, or None."""


@dataclass(slots=True, eq=False)
class PlacedValue:
    """Value of the step with its placement on the workers.

    Attributes:
        node: the node that computes this worker's part.
        placement: how the parts make up the whole.
        shape: shape of the whole value.
        dtype: dtype of its elements.
        grad: whether a gradient flows back through it.
        tensor: name of the parameter or buffer that it is, or that all its elements come from.
        dims: for each dimension the dimension of `tensor` that it is; None if it is none of them.
        exchanged: cache of exchanged versions of this value, by (kind, placement).
    """

    node: fx.Node
    placement: Placement
    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool
    tensor: str | None = None
    dims: tuple[int | None, ...] = ()
    exchanged: dict[Any, PlacedValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replacements:
    """Replacements for operations of the step that draw random numbers, use the whole batch or were not traced.

    See `parallel.operators.graph_operators`.
    """

    dropout: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    batch_norm: Callable[..., Tensor]
    opaque: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Uncut:
    """Group of parameters that every worker holds whole.

    Attributes:
        reason: why they are not sharded.
        names: names of the parameters.
        share: their share of the elements of all parameters, 0 to 1.
    """

    reason: str
    names: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        """Describe the group in one line for the user."""
        others = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return (
            f"{self.share:.1%} of the parameters are whole on all tp workers: {self.reason} ({self.names[0]}{others})"
        )


@dataclass(frozen=True, slots=True)
class LocalGraph:
    """Graph of what one worker computes of a step.

    Attributes:
        graph: placeholders (named as in `step`), calls, one output. `meta` of each node: `shape` and `dtype` (of the
            local value), `grad`, `outside` (whether it is outside the module, in the loss), `module` (path of the
            innermost module that computes it; None outside of all modules).
        step: the whole step.
        placements: placement of every parameter and buffer that the step uses.
        summed: parameters whose local gradients are partial sums, to be added up over the tensor-parallel workers.
        reasons: for each parameter or buffer that is whole on every worker the reason.
        notes: what the user should know, one line each.
    """

    graph: fx.Graph
    step: StepGraph
    placements: dict[str, Placement]
    summed: frozenset[str]
    reasons: dict[str, str]
    notes: tuple[str, ...]

    def sharded_share(self, parameters: Mapping[str, Tensor]) -> float:
        """Compute the share of the elements of a model's parameters that are sharded, 0 to 1."""
        total = sum(parameter.numel() for parameter in parameters.values())
        cut = sum(p.numel() for name, p in parameters.items() if isinstance(self.placements.get(name), Sharded))
        return cut / total if total else 0.0

    def uncut(self, parameters: Mapping[str, Tensor]) -> list[Uncut]:
        """Group the parameters that are whole on every worker by their reason, the largest share first."""
        total = sum(parameter.numel() for parameter in parameters.values())
        names: dict[str, list[str]] = {}
        for name in parameters:
            if not isinstance(self.placements.get(name), Sharded):
                names.setdefault(self.reasons.get(name, "not used in a training step"), []).append(name)
        found = [
            Uncut(reason, tuple(some), sum(parameters[name].numel() for name in some) / total)
            for reason, some in names.items()
        ]
        return sorted(found, key=lambda each: -each.share)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Dimension that the tensor degree does not divide. `what` describes it for the user, `size` is its length."""

    what: str
    size: int


class Partitioner:
    """One pass over a step. `partition` repeats passes until they learn nothing new.

    Attributes:
        exchange: the exchanges among the tensor-parallel workers.
        replacements: replacements for random, batch-wide and opaque operations.
        sequence: whether sums are reduce-scattered along the sequence instead of all-reduced.
        wanted: (parameter, dimension) -> its spans, as learnt in earlier passes.
        learnt: `wanted` for the next pass.
        obstacles: dimensions that prevented sharding.
    """

    def __init__(
        self,
        step: StepGraph,
        exchange: Exchange,
        replacements: Replacements,
        rule: Rule,
        *,
        trained: frozenset[str],
        sequence: bool = False,
        placements: Mapping[str, Placement] | None = None,
        summed: frozenset[str] | None = None,
        wanted: Mapping[tuple[str, int], tuple[int, ...]] | None = None,
    ) -> None:
        self.step = step
        self._rule = rule
        self.exchange = exchange
        self.ranks = exchange.ranks
        self.replacements = replacements
        self.sequence = sequence
        self.trained = trained
        self.fixed = placements is not None
        self._settled_summed = summed
        self.placements: dict[str, Placement] = dict(placements or {})
        self.wanted = dict(wanted or {})
        self.learnt = dict(self.wanted)
        self.obstacles: list[Obstacle] = []
        self.notes: dict[str, None] = {}
        self.reasons: dict[str, str] = {}
        self._because = ""
        self.sites = 0
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self._tensors: dict[str, fx.Node] = {}
        self._forms: dict[str, list[PlacedValue]] = {}
        self._entered: dict[str, fx.Node] = {}
        self._direct: set[str] = set()
        self._outside = False
        self._module: str | None = None
        self._roots = roots(step.graph)
        self._changed = changed_under_another_name(step.graph, self._roots)
        self._written = {
            step.tensors.get(self._roots[node.args[0]].name)
            for node in step.graph.nodes
            if writes_in_place(node) and isinstance(node.args[0], fx.Node)
        }

    # ---- the pass ---------------------------------------------------------------------------------------------------

    def run(self) -> LocalGraph:
        """Process every node of the step, and return the graph of this worker."""
        for node in self.step.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "output":
                results = [self.replicated(self._value(item)) for item in node.args[0]]
                self.graph.output(tuple(value.node for value in results))
            else:
                self.values[node] = self._call(node)
        return self._finish()

    def _placeholder(self, node: fx.Node) -> PlacedValue | None:
        val = node.meta["val"]
        if not isinstance(val, Tensor):
            return None  # a number or string in the batch, constant in the graph
        name = self.step.tensors.get(node.name)
        copy = self._tensors.get(name or "") or self.graph.placeholder(node.name)
        dims = tuple(range(val.dim()))
        value = PlacedValue(copy, REPLICATED, tuple(val.shape), val.dtype, name in self.trained, name, dims)
        if name is not None:
            self._tensors[name] = copy
            self._forms.setdefault(name, []).append(value)
        self._describe(value)
        if node in self._changed and name is not None:
            self._because = "changed in place while another name reads it"
            self.decide(value, REPLICATED)
        return value

    def _value(self, item: Any) -> Any:
        """Return the Value of an argument of a call. A parameter gets the placement decided so far."""
        if not isinstance(item, fx.Node):
            return item
        value = self.values[item]
        if isinstance(value, PlacedValue) and value.tensor in self.placements:
            value.placement = _seen(self.placements[value.tensor], value)
        return value

    def _call(self, node: fx.Node) -> Any:
        self._outside = outside_model(node)
        self._module = next(reversed(modules_around(node)), None)
        self._because = f"{_name_of(node.target)} takes all of it"
        if node.target is operator.getitem:
            return self._value(node.args[0])[node.args[1]]
        args = fx.node.map_aggregate(node.args, self._value)
        kwargs = fx.node.map_aggregate(node.kwargs, self._value)
        result = self._rule(self, node, list(args), dict(kwargs))
        if self._roots[node] in self._changed:  # its views must remain views of it
            parts = [self.replicated(part) for part in _leaves(result) if isinstance(part, PlacedValue)]
            result = parts[0] if isinstance(result, PlacedValue) else tuple(parts)
            if writes_in_place(node):
                self._forget_exchanged(node)
        first = node.args[0] if node.args else None
        if writes_in_place(node) and isinstance(first, fx.Node):
            self.values[first] = result  # later readers of the written value get the result
        return result

    def _forget_exchanged(self, written: fx.Node) -> None:
        """Clear the cached exchanges of a value that was changed in place, and of its views: they are out of date."""
        for node, value in self.values.items():
            if self._roots[node] is self._roots[written] and isinstance(value, PlacedValue):
                value.exchanged.clear()

    def _finish(self) -> LocalGraph:
        summed = set()
        settled = self._settled_summed
        for name, node in self._entered.items():
            # one all-reduce over all such gradients is cheaper than one each
            if name not in self._direct and (settled is None or name in settled):
                node.replace_all_uses_with(self._tensors[name])
                self.graph.erase_node(node)
                summed.add(name)
        for name in (settled or frozenset()) - summed:
            self._divide(name)
        for name in self._tensors:
            if name not in self.placements:
                self.placements[name] = REPLICATED
                self.reasons[name] = "nothing that can be cut uses it"
        return LocalGraph(self.graph, self.step, self.placements, frozenset(summed), self.reasons, tuple(self.notes))

    def _divide(self, name: str) -> None:
        """Divide the gradient of a parameter by the number of workers.

        The gradient is whole on every worker here, but it will be summed over them, because another shape of the step
        needs that.
        """
        node = self._tensors.get(name)
        if node is None:
            return
        for user in list(node.users):
            with self.graph.inserting_before(user):
                part = self.graph.call_function(self.exchange.divide, (node,))
            part.meta.update(node.meta)
            user.replace_input_with(node, part)

    # ---- what rules are made of -------------------------------------------------------------------------------------

    def undecided(self, value: Any) -> bool:
        """Return whether `value` is a parameter or buffer whose placement is not decided yet."""
        return isinstance(value, PlacedValue) and value.tensor is not None and value.tensor not in self.placements

    def takes_form(self, value: Any) -> bool:
        """Return whether `value` is undecided and can stay so in another form: the step does not write to it."""
        return self.undecided(value) and value.tensor not in self._written

    def decide(self, value: PlacedValue, placement: Placement) -> None:
        """Decide the placement of a parameter or buffer from the placement that one of its forms needs."""
        assert value.tensor is not None
        forms = self._forms[value.tensor]
        if isinstance(placement, Sharded):
            dim = value.dims[placement.dim]
            if dim is None or self.fixed or any(dim not in form.dims for form in forms):
                placement = REPLICATED  # `fixed`: the step that decided the placements does not use it
            else:
                placement = placement.at(dim)
        self.placements[value.tensor] = placement
        if not isinstance(placement, Sharded):
            self.reasons[value.tensor] = self._because
        for form in forms:
            form.placement = _seen(placement, form)
            form.node.meta["shape"] = local_shape(form.shape, form.placement, self.ranks)

    def origin(self, value: PlacedValue, dim: int) -> Origin:
        """Return the parameter dimension that dimension `dim` of one of its forms stands for."""
        index = value.dims[dim]
        assert value.tensor is not None
        assert index is not None
        return Origin(value.tensor, index)

    def spans(self, value: PlacedValue, dim: int) -> tuple[int, ...]:
        """Return the best spans to shard dimension `dim` of an undecided parameter by.

        Returns () if it cannot be sharded.
        """
        index = value.dims[dim]
        return () if index is None else self.wanted.get((value.tensor or "", index), (value.shape[dim],))

    def form(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: Any,
        dims: Sequence[int | None],
    ) -> PlacedValue:
        """Emit another form of the undecided parameter `args[0]`, for example its transpose.

        The form stays undecided too: its user decides.

        Args:
            function: computes the same on a shard as on the whole, along every dimension that the form keeps.
            args: the parameter and the function's other positional arguments.
            kwargs: the function's keyword arguments.
            like: a tensor with shape and dtype of the whole result.
            dims: for each dimension of the result the dimension of `args[0]` that it is; None if it is none of them.
        """
        base: PlacedValue = args[0]
        result = self.emit(function, args, kwargs, like=like)
        result.tensor = base.tensor
        result.dims = tuple(None if dim is None else base.dims[dim] for dim in dims)
        self._forms[base.tensor or ""].append(result)
        return result

    def learn(self, origin: Origin | None, spans: Sequence[int]) -> None:
        """Record for the next pass that a dimension should have been cut into these spans."""
        if origin is not None and not self.fixed:
            self.learnt[origin.tensor, origin.dim] = tuple(size * origin.unit for size in spans)

    @contextmanager
    def because(self, why: str) -> Iterator[None]:
        """Record `why` as the reason for every parameter that becomes whole inside the block."""
        before, self._because = self._because, why
        yield
        self._because = before

    def note(self, text: str) -> None:
        """Add a line for the user."""
        self.notes.setdefault(text)

    def emit(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: Any,
        placement: Placement = REPLICATED,
    ) -> PlacedValue:
        """Emit a call of `function` on the local parts. The whole result has shape and dtype of `like`."""
        values = [item for item in _leaves((args, kwargs or {})) if isinstance(item, PlacedValue)]
        for item in values:
            self._use(item)
        node = self.graph.call_function(function, _nodes(tuple(args)), _nodes(dict(kwargs or {})))
        carries = _differentiable(like.dtype) and any(v.grad for v in values) and not _makes_anew(function)
        value = PlacedValue(node, placement, tuple(like.shape), like.dtype, carries)
        self._describe(value)
        return value

    def emit_many(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        *,
        like: Sequence[Any],
        placements: Sequence[Placement],
        carries: Sequence[bool] | None = None,
    ) -> tuple[PlacedValue, ...]:
        """Emit a call of a function that returns several values, see `emit`.

        `carries` says for each result whether a gradient may flow back through it; None means all.
        """
        values = [item for item in _leaves(args) if isinstance(item, PlacedValue)]
        for each in values:
            self._use(each)
        node = self.graph.call_function(function, _nodes(tuple(args)))
        node.meta.update(shape=None, dtype=None, grad=False, module=self._module)
        flows = [any(v.grad for v in values)] * len(like)
        if carries is not None:
            flows = [flow and carry for flow, carry in zip(flows, carries, strict=True)]
        results = []
        for index, (val, placement) in enumerate(zip(like, placements, strict=True)):
            item = self.graph.call_function(operator.getitem, (node, index))
            grad = flows[index] and _differentiable(val.dtype)
            results.append(PlacedValue(item, placement, tuple(val.shape), val.dtype, grad))
            self._describe(results[-1])
        return tuple(results)

    def _use(self, value: PlacedValue) -> None:
        if value.tensor is not None and value.node is self._tensors[value.tensor]:
            self._direct.add(value.tensor)

    def _describe(self, value: PlacedValue) -> None:
        value.node.meta.update(
            shape=local_shape(value.shape, value.placement, self.ranks),
            dtype=value.dtype,
            grad=value.grad,
            outside=self._outside,
            module=self._module,
        )

    # ---- making values fit ------------------------------------------------------------------------------------------

    def settled(self, value: PlacedValue) -> PlacedValue:
        """Return the value without pending partial sums. An undecided parameter becomes replicated."""
        if self.undecided(value):
            self.decide(value, REPLICATED)
        if not isinstance(value.placement, Partial):
            return value
        if self.sequence and len(value.shape) == 3 and value.shape[1] % self.ranks == 0:
            return self._exchanged(value, "reduce_scatter", Sharded(1, (value.shape[1],)))
        return self._exchanged(value, "reduce", REPLICATED)

    def replicated(self, value: PlacedValue) -> PlacedValue:
        """Return the whole value on every worker."""
        if isinstance(value.placement, Partial):
            return self._exchanged(value, "reduce", REPLICATED)
        value = self.settled(value)
        return self._exchanged(value, "gather", REPLICATED) if isinstance(value.placement, Sharded) else value

    def entered(self, value: PlacedValue) -> PlacedValue:
        """Return the whole value on every worker, for use in sharded work: its gradient is summed over the workers."""
        value = self.settled(value)
        if not value.grad:
            return self.replicated(value)
        if isinstance(value.placement, Sharded):
            return self._exchanged(value, "gather_enter", REPLICATED)
        return self._exchanged(value, "enter", REPLICATED)

    def sharded(
        self, value: PlacedValue, dim: int, spans: tuple[int, ...], origin: Origin | None = None
    ) -> PlacedValue:
        """Return the value sharded along `dim`. An undecided parameter is sharded without communication."""
        target = Sharded(dim, spans, origin)
        if self.undecided(value) and value.dims[dim] is not None:
            self.decide(value, Sharded(dim, spans, self.origin(value, dim)))
            if isinstance(value.placement, Sharded):
                return value
        if isinstance(value.placement, Sharded) and (value.placement.dim, value.placement.spans) == (dim, spans):
            return value
        return self._exchanged(self.replicated(value), "slice", target)

    def _exchanged(self, value: PlacedValue, kind: str, target: Placement) -> PlacedValue:
        key = (kind, target)
        if key not in value.exchanged:
            where = value.placement if isinstance(value.placement, Sharded) else target
            extra = (where.dim, where.spans) if isinstance(where, Sharded) else ()
            if kind != "enter":
                self._use(value)
            function = getattr(self.exchange, kind)
            node = self.graph.call_function(function, (value.node, *extra))
            result = PlacedValue(node, target, value.shape, value.dtype, value.grad)
            self._describe(result)
            value.exchanged[key] = result
            if kind == "enter" and value.tensor is not None and value.node is self._tensors[value.tensor]:
                self._entered[value.tensor] = node
        return value.exchanged[key]

    # ---- the general rule -------------------------------------------------------------------------------------------

    def labelled(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        inputs: Mapping[int, Labels],
        output: Labels,
        *,
        like: Any,
        weights: Sequence[str] = (),
        keep: int | None = None,
    ) -> PlacedValue:
        """Emit a call of `function` with the dimensions of one label sharded over the workers.

        Args:
            function: computes the same on the shards as on the whole, apart from the sharded label.
            args: Values and literals.
            kwargs: keyword arguments, Values and literals.
            inputs: position in `args` of each Value -> its labels.
            output: labels of the result; a label missing here is summed over.
            like: a tensor with shape and dtype of the whole result.
            weights: labels that an undecided parameter may be sharded by, the best first.
            keep: position of an input that is written to: its placement must not change, so it decides.
        """
        args = list(args)
        label, spans, origin = self.choose(args, inputs, weights, keep)
        if label is None:
            converted = {index: self.replicated(args[index]) for index in inputs}
            return self.emit(function, _replaced(args, converted), kwargs, like=like)
        converted = {}
        for index, labels in inputs.items():
            value = args[index]
            if label in labels:
                converted[index] = self.sharded(value, labels.index(label), spans, origin)
            else:
                converted[index] = self.entered(value)
        placement = Sharded(output.index(label), spans, origin) if label in output else PARTIAL
        return self.emit(function, _replaced(args, converted), kwargs, like=like, placement=placement)

    def choose(
        self, args: list[Any], inputs: Mapping[int, Labels], weights: Sequence[str], keep: int | None
    ) -> tuple[str | None, tuple[int, ...], Origin | None]:
        """Return (label to shard, its spans, their origin). The label is None if nothing is sharded."""
        for index in inputs:
            if not self.undecided(args[index]):
                args[index] = self.settled(args[index])
        if self.ranks == 1:
            return None, (), None
        found: dict[str, Sharded] = {}
        for index, labels in inputs.items():
            placement = args[index].placement
            label = labels[placement.dim] if isinstance(placement, Sharded) else None
            if label is not None and isinstance(placement, Sharded) and (keep is None or index == keep):
                found.setdefault(label, placement)
        for label in weights:
            if label in found:
                return label, found[label].spans, found[label].origin
        free = self._free(args, inputs, weights)
        if free is not None:
            return free
        for label, placement in found.items():
            return label, self._common(label, args, inputs, placement), placement.origin
        return None, (), None

    def _free(
        self, args: list[Any], inputs: Mapping[int, Labels], weights: Sequence[str]
    ) -> tuple[str, tuple[int, ...], Origin] | None:
        """Return (label, spans, origin) of the best label to shard an undecided parameter by.

        Returns None if there is none.
        """
        free = [index for index in inputs if self.undecided(args[index]) and len(args[index].shape) > 1]
        if not free or not weights:
            return None
        for index in free:
            for label in weights:
                dim = inputs[index].index(label) if label in inputs[index] else None
                spans = self.spans(args[index], dim) if dim is not None else ()
                if dim is not None and Sharded(dim, spans).fits(self.ranks):
                    return label, spans, self.origin(args[index], dim)
        self._obstacle(args[free[0]], inputs[free[0]], weights)
        return None

    def _common(self, label: str, args: list[Any], inputs: Mapping[int, Labels], first: Sharded) -> tuple[int, ...]:
        """Return the spans for a label that several inputs may have cut differently.

        Records them for the inputs that differ.
        """
        others = [
            args[i].placement
            for i, labels in inputs.items()
            if isinstance(args[i].placement, Sharded) and labels[args[i].placement.dim] == label
        ]
        finest = max((p.spans for p in others), key=len, default=first.spans)
        for placement in others:
            if placement.spans != finest:
                self.learn(placement.origin, finest)
        return finest

    def _obstacle(self, value: PlacedValue, labels: Labels, weights: Sequence[str]) -> None:
        sizes = [value.shape[labels.index(label)] for label in weights if label in labels]
        self.obstacles.append(Obstacle(f"{value.tensor} (features {' and '.join(map(str, sizes))})", sizes[0]))
        self._because = f"tp={self.ranks} divides none of its features ({' and '.join(map(str, sizes))})"

    def fallback(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], why: str) -> Any:
        """Emit the call on every worker with gathered inputs. `why` is the reason that parameters become whole."""
        self._because = why or self._because

        def whole(item: Any) -> Any:
            return self.replicated(item) if isinstance(item, PlacedValue) else item

        args, kwargs = fx.node.map_aggregate(args, whole), fx.node.map_aggregate(kwargs, whole)
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            return self.emit(node.target, args, kwargs, like=val)  # type: ignore[arg-type]
        if isinstance(val, (tuple, list)):
            target: Any = node.target
            function = bound(target, **_nodes(kwargs)) if kwargs else target
            return self.emit_many(function, args, like=val, placements=[REPLICATED] * len(val))
        self.graph.call_function(node.target, _nodes(tuple(args)), _nodes(kwargs)).meta.update(  # type: ignore[arg-type]
            shape=None, dtype=None, grad=False
        )
        return None


def _seen(placement: Placement, form: PlacedValue) -> Placement:
    """Return the placement of a form of a parameter from the `placement` of the parameter itself."""
    return placement.at(form.dims.index(placement.dim)) if isinstance(placement, Sharded) else placement


Local = TypeVar("Local", bound=Callable[..., Any])


def local(function: Local) -> Local:
    """Mark a function of a graph that computes with torch's operations from its arguments alone: it can be compiled."""
    function.computes_locally = True  # type: ignore[attr-defined]
    return function


def operation_of(target: Any) -> Any:
    """Return the operation of torch that a graph's call target runs, with or without bound arguments.

    Returns None for what computes with several or communicates.
    """
    target = getattr(target, "func", target)
    return target if isinstance(target, torch._ops.OpOverload) else None


def is_local(target: Any) -> bool:
    """Return whether a graph's call target was marked by `local`."""
    return bool(getattr(getattr(target, "func", target), "computes_locally", False))


def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Return `functools.partial` with a `__name__`, which an fx graph needs."""
    result = partial(function, *args, **kwargs)
    result.__name__ = getattr(function, "__name__", "operation")  # type: ignore[attr-defined]
    return result


def _name_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return str(getattr(target, "__name__", target)) if schema is None else str(schema.name).rpartition("::")[2]


def _makes_anew(function: Any) -> bool:
    """Return whether an operation takes only shape and dtype from a tensor, so that no gradient flows back to it."""
    return _name_of(function).startswith(("new_", "empty_", "zeros_", "ones_", "full_"))


def _differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _replaced(args: Sequence[Any], converted: Mapping[int, PlacedValue]) -> list[Any]:
    return [converted.get(index, item) for index, item in enumerate(args)]


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(tree, lambda item: found.append(item))
    return found


def _nodes(tree: Any) -> Any:
    """Replace the Values in `tree` by their nodes."""
    return fx.node.map_aggregate(tree, lambda item: item.node if isinstance(item, PlacedValue) else item)
