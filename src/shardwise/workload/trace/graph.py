"""The traced graph of one training or evaluation step of a plain module.

`torch.export` runs the module and its loss once on tensors without data and records the operations (ATen, before
autograd; composite ones such as `linear` or `scaled_dot_product_attention` stay whole). Shapes are fixed in the graph,
so there is one graph per batch shape; nothing else of the trace is used as a fact about the data.
"""

from __future__ import annotations

import io
import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from shardwise.errors import DataError, WorkloadError
from shardwise.workload.data import first_samples
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.losses import losses_of, total
from shardwise.workload.own_step import run_step
from shardwise.workload.precision import Kept, calls_computing, computed, give_narrow, kept_of
from shardwise.workload.trace.functions import DerivativesRefused, functions_kept
from shardwise.workload.trace.opaque import Call, assignments_copied, calls_in, hidden
from shardwise.workload.trace.python_state import for_trace
from shardwise.workload.trace.stand_ins import stand_ins
from shardwise.workload.workload import Workload, call_model

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_SET_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_ASSERTS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)


MOST_TRACES = 6
"""Number of times that a step is traced if values are missing, see `_exported`."""

_LIFTED = "lifted_tensor"
"""Start of torch's names for tensors that a step makes by itself."""

_LOGGERS = ("torch.export", "torch._subclasses.fake_tensor")


@dataclass(frozen=True, slots=True)
class StepGraph:
    """One step as a graph of ATen operations.

    Attributes:
        graph: placeholders, calls of ATen operations, one output node with a tuple of values: (loss,) in training,
            (loss, metric) in evaluation. Each node's `meta["val"]` is a tensor without data, or a tuple of them.
        tensors: map from a placeholder's name to the name of the module's parameter or persistent buffer.
        constants: map from a placeholder's name to a tensor that the module holds but does not save.
        leaves: names of the batch's placeholders, in the order of `pytree.tree_leaves(batch)`.
        training: whether the module was in training mode.
        opaque: calls of modules that were not traced; see `workload.trace.opaque`.
        losses: names of the losses whose sum is the first output; if there are several, they follow it in training.
        narrow: names in the module of the float32 parameters that the step uses in bfloat16 only, and is given so.
        rebuild: builds the model's output from the tensors that follow the loss in an evaluation whose metric is an
            object that collects outputs. None for every other step.
    """

    graph: fx.Graph
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    leaves: tuple[str, ...]
    training: bool
    opaque: tuple[Call, ...] = ()
    losses: tuple[str, ...] = ("loss",)
    rebuild: Callable[[Sequence[Tensor]], Any] | None = None
    narrow: frozenset[str] = frozenset()

    def is_narrow(self, node: fx.Node) -> bool:
        """Return whether a node stands for a float32 parameter that is given in bfloat16."""
        return node.op == "placeholder" and self.tensors.get(node.name) in self.narrow


@dataclass(slots=True)
class _Noted:
    """Facts that a trace finds besides the graph.

    Attributes:
        losses: names of the losses.
        rebuild: see `StepGraph.rebuild`.
    """

    losses: tuple[str, ...] = ()
    rebuild: Callable[[Sequence[Tensor]], Any] | None = None

    def output_of(self, workload: Workload, output: Any) -> list[Tensor]:
        """Return the tensors in an output of the model, and note how to rebuild it from such tensors."""
        leaves, spec = pytree.tree_flatten(output)
        for leaf in leaves:
            if not (leaf is None or isinstance(leaf, Tensor | bool | int | float | str)):
                raise WorkloadError(
                    f"the metric of workload {workload.name!r} collects outputs, which tp and pp pass on as tensors in "
                    f"tuples, lists or dicts, not as {type(leaf).__name__}: return such, or use dp or fsdp"
                )
        fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def rebuild(tensors: Sequence[Tensor]) -> Any:
            filled = list(fixed)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return pytree.tree_unflatten(filled, spec)

        self.rebuild = rebuild
        return [leaves[place].clone() for place in places]  # a clone is a result even of what is only passed through


class _StepModule(nn.Module):
    """Model, loss and metric as one module, so that the graph extends from the batch to the loss."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        training: bool,
        evaluation: Evaluation | None,
        noted: _Noted,
        after: Callable[[], None] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self._workload = workload
        self._own = workload.step is not None and training
        self._evaluation = evaluation
        self._noted = noted
        self._after = after

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        output = None
        with assignments_copied(self.model):
            if self._own:
                with calls_computing(self._workload.precision, self.model, self.model.parameters, kept=self._kept()):
                    losses = run_step(self._workload, self.model, batch)
            else:
                output = self._called(batch)
        if not self._own:
            losses = losses_of(self._workload, self.model, output, batch)
        self._noted.losses = tuple(losses)
        further = self._further(output, batch, losses)
        if self._after is not None:
            self._after()
        return total(losses), *further

    def _called(self, batch: Any) -> Any:
        """Call the model as the program calls it: in its precision, with float32 outside."""
        workload, model = self._workload, self.model
        call = partial(call_model, model, workload.inputs(batch))
        return computed(workload.precision, model.parameters(), call, kept=self._kept())

    def _kept(self) -> Kept:
        return kept_of(self._workload.precision, self.model, self._workload.float32)

    def _further(self, output: Any, batch: Any, losses: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return what follows the loss: the metric or the outputs in an evaluation, several losses in training."""
        if self._evaluation is None:
            return tuple(losses.values()) if len(losses) > 1 else ()
        if self._evaluation.collects:
            return tuple(self._noted.output_of(self._workload, output))
        measure: Any = self._evaluation.measure
        return (torch.as_tensor(measure(output, batch)),)


class Untraceable(WorkloadError):
    """Error of a step that cannot be traced.

    Attributes:
        module: name of the innermost module in which the trace failed. None if it failed outside all modules.
        reason: reason in one line.
    """

    def __init__(self, workload: Workload, module: str | None, reason: str) -> None:
        self.module, self.reason = module, reason
        where = f" in module {module!r}" if module else ""
        hint = "" if module else "; use dp or fsdp, which run a module as it is"
        super().__init__(f"workload {workload.name!r} cannot be traced{where}: {reason}{hint}")


def trace(
    workload: Workload,
    model: nn.Module,
    batch: Any,
    *,
    training: bool = True,
    evaluation: int = 0,
    opaque: Mapping[str, Sequence[Call]] | None = None,
    after: Callable[[], None] | None = None,
) -> StepGraph:
    """Trace one step on batches shaped like `batch`, in training or with the metric of evaluation `evaluation`.

    In training, every submodule is traced in its current mode. The module's modes and tensors are unchanged afterwards.
    Modules named in `opaque` are not entered; see `workload.trace.opaque`. `after` is called when the step has run,
    before torch gives the modules' attributes their old values again.

    Raises:
        Untraceable: the module or its loss cannot be traced.
        WorkloadError: the loss is not a scalar.
    """
    noted = _Noted()
    evaluations = () if training else workload.evaluations
    step = _StepModule(workload, model, training, evaluations[evaluation] if evaluations else None, noted, after)
    try:
        with (
            for_trace(step, training=training),
            _quiet(),
            stand_ins(model, batch) as (_, given),
            hidden(opaque or {}),
            functions_kept() as kept,
            DerivativesRefused(),
        ):
            program = _exported(step, given)
    except WorkloadError:
        raise
    except Exception as error:
        raise Untraceable(workload, _innermost(model, error), first_line(error)) from error
    graph = _inlined(program.graph_module)
    following = next((node for node in graph.nodes if _follows_data(node)), None)
    if following is not None:
        reason = f"what {following.target} gives has a shape or a number that follows the data"
        raise Untraceable(workload, _enclosing(graph, following), reason)
    _check_loss(workload, graph)
    found = _named(workload, program, graph, model, training, noted)
    del kept  # `found` holds those that are in the graph
    return found


def _exported(step: nn.Module, batch: Any) -> torch.export.ExportedProgram:
    """Export a step, again if torch has lost the values of a tensor that the step makes by itself.

    In processes with several threads, torch 2.13 now and then takes such a tensor (the `arange` of a causal mask in
    Llama, about one trace in eight) for a constant, of which it knows the shape only; for some it raises an error. The
    next trace has it right. A tensor that an earlier trace left in an attribute of the module stays without values.
    """
    for number in range(MOST_TRACES):
        try:
            program = torch.export.export(step, (batch,), strict=False)
        except RuntimeError as error:
            if _LIFTED not in str(error) or number == MOST_TRACES - 1:
                raise
            continue
        lost = [name for name, tensor in program.constants.items() if _values(tensor) is None]
        if not any(name.rpartition(".")[2].startswith(_LIFTED) for name in lost):
            break
    return program


def _values(constant: Tensor) -> Tensor | None:
    """Return the tensor behind a constant of a trace. Returns None if the trace has only its shape."""
    return constant.constant if isinstance(constant, FakeTensor) else constant


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of torch.export, which do not concern users, and the graphs it prints when it fails."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def names_of(model: nn.Module) -> dict[int, str]:
    """Map the identities of the modules' attributes to their names: torch.export runs copies that share these."""
    return {id(vars(module)): name for name, module in model.named_modules()}


def _innermost(model: nn.Module, error: BaseException) -> str | None:
    """Return the name of the innermost module whose forward was running, from the tracebacks of an error's causes.

    Returns None if no module was running.
    """
    names = names_of(model)
    found = None
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(vars(module)) in names:
                found = names[id(vars(module))]
        cause = cause.__cause__ or cause.__context__
    return found


def _follows_data(node: fx.Node) -> bool:
    """Return whether a value is a number, or has a shape, that depends on the data."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(
        isinstance(leaf, symbols) or (isinstance(leaf, Tensor) and any(isinstance(s, symbols) for s in leaf.shape))
        for leaf in leaves
    )


def _enclosing(graph: fx.Graph, node: fx.Node) -> str | None:
    """Return the innermost module around `node` that returns nothing with a data-dependent shape or number.

    Returns None if there is no such module.
    """
    for path in reversed(modules_around(node)):
        inside = [other for other in graph.nodes if path in modules_around(other)]
        given = [other for other in inside if any(path not in modules_around(user) for user in other.users)]
        if not any(_follows_data(other) for other in given):
            return path
    return None


def modules_around(node: fx.Node) -> list[str]:
    """Return the names of the modules around a call, the outermost first."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [path.removeprefix("model").removeprefix(".") for path in stack if path.split(".")[0] == "model"]


def first_line(error: Exception) -> str:
    """Format the type and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check_loss(workload: Workload, graph: fx.Graph) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    loss = output.args[0][0]
    shape = tuple(loss.meta["val"].shape) if isinstance(loss, fx.Node) else None
    if shape != ():
        raise WorkloadError(f"the loss of workload {workload.name!r} has shape {shape}: it must be a scalar, a mean")


def _inlined(module: fx.GraphModule) -> fx.Graph:
    """Copy the graph without nesting: bodies of `no_grad` and `autocast` regions in place, assertions left out."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            continue  # the body of a region, inlined at its call
        _copy(node, module, graph, values)
    return graph


def _copy(node: fx.Node, owner: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    if node.target in _ASSERTS:
        return
    if node.target in (_SET_GRAD, _SET_AUTOCAST):
        first = 1 if node.target is _SET_GRAD else 4
        arguments: list[Any] = list(node.args)
        body = getattr(owner, arguments[first].target)
        operands = [values[argument] for argument in arguments[first + 1 :]]
        without_gradient = node.target is _SET_GRAD and node.args[0] is False
        values[node] = (_inline_detached if without_gradient else _inline)(body, operands, graph)
    elif node.target is operator.getitem and not isinstance(values[node.all_input_nodes[0]], fx.Node):
        index: Any = node.args[1]
        values[node] = values[node.all_input_nodes[0]][index]
    else:
        values[node] = graph.node_copy(node, lambda argument: values[argument])


def _inline_detached(body: fx.GraphModule, operands: list[Any], graph: fx.Graph) -> tuple[Any, ...]:
    """Inline a `no_grad` region and detach its results; tensors that it changes in place keep their gradient."""
    within = [_detached(operand, graph) for operand in operands] if _changes_tensors(body) else operands
    original = dict(zip(within, operands, strict=True))
    results = []
    for result in _inline(body, within, graph):
        source = result
        while isinstance(source, fx.Node) and source not in original and _is_in_place(source):
            source = source.args[0]
        changed = source is not result and source in original
        results.append(original[source] if changed else _detached(result, graph))
    return tuple(results)


def _is_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and schema.name.endswith("_")


def _changes_tensors(body: fx.GraphModule) -> bool:
    """Return whether a region writes in place to any tensor."""
    targets = [node.target for node in body.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any(target._schema.is_mutable for target in targets)


def _inline(body: fx.GraphModule, operands: list[Any], graph: fx.Graph) -> tuple[Any, ...]:
    values: dict[fx.Node, Any] = {}
    inputs = iter(operands)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "output":
            results = fx.node.map_arg(node.args[0], lambda argument: values[argument])
            return tuple(results) if isinstance(results, (tuple, list)) else (results,)
        elif node.op != "get_attr":
            _copy(node, body, graph, values)
    raise AssertionError("a region without an output")


def _detached(result: Any, graph: fx.Graph) -> Any:
    """Detach a tensor that leaves a `no_grad` region, or is written to in one; return other values unchanged."""
    if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), Tensor):
        return result
    node = graph.call_function(torch.ops.aten.detach.default, (result,))
    node.meta.update(val=result.meta["val"].detach(), nn_module_stack=result.meta.get("nn_module_stack"))
    return node


def _named(
    workload: Workload,
    program: torch.export.ExportedProgram,
    graph: fx.Graph,
    model: nn.Module,
    training: bool,
    noted: _Noted,
) -> StepGraph:
    """Sort the placeholders by what they stand for; a tied tensor gets the first of its names in the module."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names[name] = first.setdefault(id(tensor), name)
    tensors: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        target = (spec.target or "").removeprefix("model.")
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            tensors[spec.arg.name] = names[target]
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            constants[spec.arg.name] = _with_values(workload, program.constants[spec.target or ""], spec.target or "")
        elif spec.kind is not InputKind.USER_INPUT:
            raise WorkloadError(
                f"the module holds {spec.target!r} of kind {spec.kind.name}: only tensors can be traced"
            )
    leaves = tuple(spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    narrow = frozenset(tensors[name] for name in give_narrow(graph, tensors))
    return StepGraph(graph, tensors, constants, leaves, training, calls_in(graph), noted.losses, noted.rebuild, narrow)


def _with_values(workload: Workload, constant: Tensor, name: str) -> Tensor:
    """Return a tensor that the step makes by itself, or holds in an attribute, with its values.

    Raises:
        Untraceable: torch has left only its shape in the trace.
    """
    values = _values(constant)
    if values is None:
        reason = f"the trace has no values for {name}: make the tensor from the batch, or make it a buffer"
        raise Untraceable(workload, None, reason)
    return values


def example(workload: Workload, samples: int) -> Any:
    """Return a batch of the dataset's first `samples` samples.

    Raises:
        DataError: the dataset is empty.
        WorkloadError: reading it would use up samples that training needs.
    """
    chosen = first_samples(workload.dataset, samples)
    if chosen is None:
        raise WorkloadError(
            f"the dataset of workload {workload.name!r} can be read only once, and tp and pp look at a batch first: "
            "give an iterable whose iter() starts anew"
        )
    if not chosen:
        raise DataError(f"the dataset of workload {workload.name!r} is empty: there is nothing to train on")
    return (workload.collate or default_collate)(chosen)


def outside_model(node: fx.Node) -> bool:
    """Return whether a call of a step belongs to the loss, the metric or the inputs instead of the module."""
    stack = node.meta.get("nn_module_stack") or {}
    return not any(path == "model" or path.startswith("model.") for path, _ in stack.values())


def batch_leaves(batch: Any) -> list[Any]:
    """Return the values of a batch in the order of `StepGraph.leaves`."""
    leaves: list[Any] = pytree.tree_leaves(batch)
    return leaves
