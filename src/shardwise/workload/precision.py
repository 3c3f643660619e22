"""Compute a plain module in bfloat16 from float32 parameters: `precision=bf16` and `precision=autocast`.

bf16        every operation sees each parameter as a copy in bfloat16, and products compute in bfloat16 whatever else
            they are given, so that what flows between layers is bfloat16 as well. Kernels of norms and of softmax add
            up in float32 inside; on a CPU those of norms and lookups do not, and are given float32. Losses are computed
            in float32.
autocast    as torch's autocast on a GPU: products compute in bfloat16; parameters and what else is not a product stay
            in float32, and so do most of the values between layers.

Gradients return through the copies: they are float32 where they add up over microbatches and workers (Micikevicius et
al. 2018, section 3.1).

`Workload.float32` names modules and parameters that stay in float32 in both: see `Kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from shardwise.errors import WorkloadError, nearest
from shardwise.options import AUTOCAST, BF16, FLOAT32
from shardwise.workload.pytree import map_tensors

PRODUCTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm mv addmv einsum tensordot bilinear chain_matmul "
    "multi_dot conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc grouped_mm _grouped_mm "
    "scaled_dot_product_attention multi_head_attention_forward lstm gru rnn_tanh rnn_relu lstm_cell gru_cell "
    "rnn_tanh_cell rnn_relu_cell".split()
)
"""Names of the functions that compute in bfloat16 whatever they are given."""

NORMS = frozenset("layer_norm group_norm rms_norm native_layer_norm".split())
"""Names of the norms whose kernels compute in the dtype of their input, and add up in float32."""

LOSSES = frozenset(
    "cross_entropy nll_loss nll_loss2d binary_cross_entropy binary_cross_entropy_with_logits kl_div mse_loss l1_loss "
    "smooth_l1_loss huber_loss poisson_nll_loss gaussian_nll_loss hinge_embedding_loss margin_ranking_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss multi_margin_loss soft_margin_loss cosine_embedding_loss "
    "triplet_margin_loss triplet_margin_with_distance_loss ctc_loss".split()
)
"""Names of the functions that compute in float32."""

WIDENED = (
    NORMS
    | LOSSES
    | frozenset(
        "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus "
        "frobenius_norm nuclear_norm cosine_similarity dist pdist cdist renorm logsumexp interpolate prod softmax "
        "log_softmax cumprod cumsum vector_norm matrix_norm sum norm".split()
    )
)
"""Names of the functions that autocast computes in float32 (ATen/autocast_mode.h: AT_FORALL_FP32,
AT_FORALL_FP32_SET_OPT_DTYPE)."""

WRITERS = frozenset(
    "index_add index_add_ scatter scatter_ scatter_add scatter_add_ index_copy index_copy_ masked_scatter "
    "masked_scatter_ index_put index_put_".split()
)
"""Names of the functions that write values into a tensor, whose dtype the values must have."""

STATISTICAL = frozenset("batch_norm instance_norm".split())
"""Names of the norms with running statistics, which are float32, and so are their parameters."""

LOOKUPS = frozenset("embedding embedding_bag".split())
"""Names of the functions that look up rows of a table; `max_norm` is their argument number MAX_NORM."""

MAX_NORM = 3

IN_PLACE = frozenset("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__".split())
"""Names of the operators that change their first tensor."""

UNCHANGED = frozenset("opaque register_hook register_post_accumulate_grad_hook".split())
"""Names of the functions that are given parameters as they are; a module that is not traced comes back here."""

PRODUCTS_AND_NORMS, NORMS_AND_LOOKUPS = PRODUCTS | NORMS, NORMS | LOOKUPS

_DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]

_FOR_GPU = ContextVar("_FOR_GPU", default=False)


@contextmanager
def for_gpu(wanted: bool = True) -> Iterator[None]:
    """Make modules on the CPU, or without values, compute inside the block as they would on a GPU."""
    token = _FOR_GPU.set(wanted)
    try:
        yield
    finally:
        _FOR_GPU.reset(token)


def is_for_gpu() -> bool:
    """Return whether we are inside of `for_gpu`."""
    return _FOR_GPU.get()


class Copies:
    """Copies of float32 parameters in bfloat16, made once in each step.

    Attributes:
        adds: whether the backward pass adds the gradients of copies to an existing `grad` of their parameters itself,
            in one kernel. Autograd, which casts them first, then has nothing to accumulate, and calls no hook of the
            parameter.
    """

    def __init__(self) -> None:
        self.adds = False
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with the parameter, or another could get its id

    def of(self, parameter: Tensor) -> Tensor:
        """Return the copy of a parameter; its gradient goes to the parameter in float32.

        The result has the parameter as `copied_from`. What was gathered in bfloat16 is returned as it is.
        """
        if parameter.dtype == torch.bfloat16:
            return parameter
        key = id(parameter)
        if key not in self._made:
            self._made[key] = parameter, parameter.detach().to(torch.bfloat16)
        seen: Any = _Copied.apply(*self._made[key], self)  # type: ignore[no-untyped-call]
        seen.copied_from = parameter
        return seen  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Drop all copies: the parameters change."""
        self._made.clear()

    @contextmanager
    def adding(self, wanted: bool) -> Iterator[None]:
        """Let a backward pass in the block add gradients itself if `wanted`, see `adds`."""
        self.adds = wanted
        try:
            yield
        finally:
            self.adds = False

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Make new copies for what is computed in the block, and drop them after it."""
        self.forget()
        try:
            yield
        finally:
            self.forget()


class _Copied(torch.autograd.Function):
    """A parameter as its copy.

    Each use is a node of its own in the graph of gradients, at its place: a cast that all passes share would come last
    in the backward pass, and so would all gradients.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor, copies: Copies) -> Tensor:
        ctx.set_materialize_grads(False)  # a gradient that is computed later comes as None
        ctx.parameter, ctx.copies = parameter, copies
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient, parameter = gradients[0], ctx.parameter
        if gradient is None:
            return None, None, None
        if ctx.copies.adds and parameter.is_leaf and parameter.grad is not None:
            with torch.no_grad():
                parameter.grad.add_(gradient)
            return None, None, None
        return gradient.float(), None, None


@dataclass(frozen=True, slots=True)
class Kept:
    """Parts of a model that stay in float32 whatever its precision.

    Attributes:
        modules: modules that compute as they are written, from inputs and parameters in float32.
        names: names of the parameters that operations see in float32. An operation that is given one of them computes
            in float32.
        tensors: returns these parameters, as the model holds them now.
    """

    modules: tuple[nn.Module, ...] = ()
    names: frozenset[str] = frozenset()
    tensors: Callable[[], Iterable[Tensor]] = tuple


NOTHING = Kept()


def kept_of(precision: str, model: nn.Module, patterns: Sequence[str], path: str = "") -> Kept:
    """Return the parts of a model that shell-style patterns keep in float32: none if all computes in float32 anyway.

    A module stands for all that is in it. A parameter that several modules hold is kept in all of them. `path` is the
    name of `model` in the model that the patterns are for.
    """
    if precision == FLOAT32 or not patterns:
        return NOTHING

    def named(name: str) -> bool:
        parts = f"{path}.{name}".strip(".").split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(fnmatchcase(each, pattern) for each in around for pattern in patterns)

    modules = dict.fromkeys(each for name, each in model.named_modules(remove_duplicate=False) if named(name))
    kept = {id(each) for name, each in model.named_parameters(remove_duplicate=False) if named(name)}
    names = frozenset(name for name, each in model.named_parameters() if id(each) in kept)
    held = [(each._parameters, key) for each in model.modules() for key in each._parameters]
    owners = [(parameters, key) for parameters, key in held if id(parameters[key]) in kept]
    return Kept(tuple(modules), names, lambda: (tensor for owner, key in owners if (tensor := owner[key]) is not None))


def check_kept(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raise WorkloadError, which names the nearest name, if a pattern names neither a module nor a parameter."""
    modules = (name for name, _ in model.named_modules(remove_duplicate=False))
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    names = list(dict.fromkeys((*filter(None, modules), *parameters)))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise WorkloadError(
                f"float32: {pattern!r} names neither a module nor a parameter of the model{nearest(pattern, names)}"
            )


def computing(
    precision: str, parameters: Iterable[Tensor], copies: Copies | None = None, kept: Kept = NOTHING
) -> AbstractContextManager[Any]:
    """Return a context in which the operations of a module compute in a precision.

    Args:
        precision: `float32`, `bf16` or `autocast`.
        parameters: the module's parameters.
        copies: copies that operations share. None: each operation casts the parameters that it uses.
        kept: parts of the module that stay in float32.
    """
    if precision not in (BF16, AUTOCAST):
        return nullcontext()
    return Computing(parameters, copies, kept, everywhere=precision == BF16)


def computed(
    precision: str,
    parameters: Iterable[Tensor],
    call: Callable[[], Any],
    copies: Copies | None = None,
    kept: Kept = NOTHING,
) -> Any:
    """Return what `call` gives in a precision, with its tensors in float32; the other arguments are of `computing`."""
    with computing(precision, parameters, copies, kept):
        output = call()
    return output if precision == FLOAT32 else widened(output)


class Computing(TorchFunctionMode):
    """Mode under which products compute in bfloat16.

    Args:
        parameters: the module's parameters.
        copies, kept: as in `computing`.
        everywhere: whether all operations see the parameters in bfloat16, as `bf16` says; else as `autocast` does.
    """

    def __init__(
        self, parameters: Iterable[Tensor], copies: Copies | None, kept: Kept = NOTHING, *, everywhere: bool
    ) -> None:
        super().__init__()
        self._kept, self._modules = frozenset(map(id, kept.tensors())), kept.modules
        wide = (id(parameter) for parameter in parameters if parameter.dtype == torch.float32)
        self._wide = frozenset(wide) - self._kept
        self._inside = False  # of a module that stays in float32
        self._everywhere, self._copies = everywhere, copies
        self._narrow_ones = PRODUCTS_AND_NORMS if everywhere else PRODUCTS
        self._wide_ones = LOSSES if everywhere else WIDENED
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Computing:
        with ExitStack() as stack:
            stack.enter_context(_checkpoints_wrapped(self._alike))
            stack.enter_context(_forwards_wrapped(self._modules, self._in_float32))
            self._entered.append(stack.pop_all())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._entered.pop().close()

    def _alike(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that computes as under this mode now, also when the mode has been left."""
        inside = self._inside

        def alike(*args: Any, **kwargs: Any) -> Any:
            with self, self._being(inside):
                return function(*args, **kwargs)

        return alike

    def _in_float32(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a module that stays in float32: nothing inside is cast but what it is given."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._being(True):
                return original(*widened(args), **widened(kwargs))

        return forward

    @contextmanager
    def _being(self, inside: bool) -> Iterator[None]:
        before, self._inside = self._inside, inside
        try:
            yield
        finally:
            self._inside = before

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return function(*args, **kwargs)
        if self._everywhere and function == _DTYPE and id(args[0]) in self._wide:
            return torch.bfloat16
        name = getattr(function, "__name__", "")
        if name in UNCHANGED or name in ("__get__", "__set__", "__delete__"):
            return function(*args, **kwargs)
        if self._kept and self._is_given_kept((*args, *kwargs.values())):
            return self._with(lambda tensor: _wide(self._parameter(tensor)), function, name, args, kwargs)
        if name in STATISTICAL:
            return function(*args[:1], *map(widened, args[1:]), **_but_input(kwargs, widened))
        if self._everywhere and name in NORMS_AND_LOOKUPS and _on_cpu(args, kwargs):
            output = function(*map(widened, args), **{key: widened(each) for key, each in kwargs.items()})
            return output.to(torch.bfloat16) if isinstance(output, Tensor) else output
        if self._everywhere and name in LOOKUPS and _changes_table(args, kwargs):
            return function(*args, **kwargs).to(torch.bfloat16)
        return self._with(self._changed(name), function, name, args, kwargs)

    def _is_given_kept(self, values: Iterable[Any]) -> bool:
        lists = (each for each in values if type(each) in (list, tuple))
        return any(id(each) in self._kept for each in values) or any(map(self._is_given_kept, lists))

    def _with(
        self, changed: Callable[[Tensor], Tensor], function: Callable[..., Any], name: str, args: Any, kwargs: Any
    ) -> Any:
        """Call a function with its tensors changed, except for one that it writes to."""
        first = args[:1] if _writes(name) else ()  # itself, not a copy, is written to
        args = [*first, *(self._seen(each, changed) for each in args[len(first) :])]
        kwargs = {key: each if key == "out" else self._seen(each, changed) for key, each in kwargs.items()}
        return _fitted(function, args, kwargs) if name in WRITERS else function(*args, **kwargs)

    def _changed(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return how a function's tensors are changed."""
        if name in self._narrow_ones:
            return self._narrow
        if name in self._wide_ones:
            return _wide
        return self._parameter if self._everywhere else _same

    def _seen(self, value: Any, changed: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, Tensor):
            return changed(value)
        if type(value) in (list, tuple):
            return type(value)(self._seen(each, changed) for each in value)
        return value

    def _narrow(self, tensor: Tensor) -> Tensor:
        tensor = self._parameter(tensor)
        return tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor

    def _parameter(self, tensor: Tensor) -> Tensor:
        """Return the copy of a parameter; any other tensor itself."""
        if id(tensor) not in self._wide:
            return tensor
        return tensor.to(torch.bfloat16) if self._copies is None else self._copies.of(tensor)


@contextmanager
def _forwards_wrapped(
    modules: Iterable[nn.Module], wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace `forward` of modules by `wrapped(forward)` inside the block."""
    before = [(vars(module), vars(module).get("forward")) for module in modules]
    for module in modules:
        module.forward = wrapped(module.forward)
    try:
        yield
    finally:
        for attributes, own in before:
            del attributes["forward"]
            attributes.update({} if own is None else {"forward": own})


@contextmanager
def _checkpoints_wrapped(wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Make torch's activation checkpoints recompute `wrapped(function)` instead of a function.

    They restore autocast for a recomputation, but not function modes.
    """
    plain, reentrant = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction
    patched: Any = checkpoint

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(wrapped(function), *args, **kwargs)

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(wrapped(function), *args)  # type: ignore[no-untyped-call]

    patched._checkpoint_without_reentrant_generator, patched.CheckpointFunction = generator, Reentrant
    try:
        yield
    finally:
        patched._checkpoint_without_reentrant_generator, patched.CheckpointFunction = plain, reentrant


def _on_cpu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation runs on a CPU, whose norms and lookups add up in the dtype of their input."""
    given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
    return given is not None and given.device.type != "cuda" and not is_for_gpu()


def _changes_table(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a lookup scales the rows that it reads (`max_norm`), or wants sparse gradients of the table."""
    scaled = args[MAX_NORM] if len(args) > MAX_NORM else kwargs.get("max_norm")
    return scaled is not None or any(each is True for each in args[MAX_NORM + 1 :]) or bool(kwargs.get("sparse"))


def _but_input(kwargs: Mapping[str, Any], changed: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: each if key == "input" else changed(each) for key, each in kwargs.items()}


def _writes(name: str) -> bool:
    """Return whether a function changes its first tensor."""
    return (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _fitted(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function that writes values into its first argument, with all of them in the dtype of that."""
    into = args[0] if args else kwargs.get("input")
    if not isinstance(into, Tensor) or not into.is_floating_point():
        return function(*args, **kwargs)

    def fitted(value: Any) -> Any:
        mixed = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != into.dtype
        return value.to(into.dtype) if mixed else value

    return function(*map(fitted, args), **{key: fitted(each) for key, each in kwargs.items()})


def widened(output: Any) -> Any:
    """Return a value with its tensors in float32 where they are in bfloat16."""
    return map_tensors(_wide, output)


@contextmanager
def calls_computing(
    precision: str,
    model: nn.Module,
    parameters: Callable[[], Iterable[Tensor]],
    copies: Copies | None = None,
    kept: Kept = NOTHING,
) -> Iterator[None]:
    """Make each call of a model, or of a part of it, compute in a precision and return float32 inside the block.

    What is computed between such calls stays in float32. The other arguments are those of `computing`.
    """
    if precision not in (BF16, AUTOCAST):
        yield
        return
    inside = False

    def entered(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            inside = True
            try:
                return computed(precision, parameters(), lambda: original(*args, **kwargs), copies, kept)
            finally:
                inside = False

        return forward

    with _forwards_wrapped([each for each in model.modules() if each not in kept.modules], entered):
        yield


def give_narrow(graph: fx.Graph, tensors: Collection[str]) -> list[str]:
    """Take the casts of those placeholders in `tensors` out of a graph that it uses in bfloat16 only.

    The graph is then given these in bfloat16. Changes `graph` in place.

    Returns:
        The names of the placeholders.
    """
    found = []
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.name in tensors]:
        if node.users and all(_is_cast(user) for user in node.users):
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.erase_node(user)
            node.meta["val"] = node.meta["val"].to(torch.bfloat16)
            found.append(node.name)
    return found


def _is_cast(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.to.dtype and node.args[1:] == (torch.bfloat16,) and not node.kwargs
