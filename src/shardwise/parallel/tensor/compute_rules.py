"""Tensor-parallel rules of operations that compute: how the result's dimensions depend on those of the inputs.

A rule gives every dimension a label. Dimensions with equal labels are sharded alike, and a label that the result lacks
is summed over (`Partitioner.labelled`). Operations without a rule are computed on every worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.parallel.tensor import view_rules, vocab_parallel
from shardwise.parallel.tensor.aliasing import writes_in_place
from shardwise.parallel.tensor.partitioner import Labels, Obstacle, Partitioner, PlacedValue, Rule, bound, local
from shardwise.parallel.tensor.placement import PARTIAL, REPLICATED, Partial, Placement, Sharded
from shardwise.workload.trace.opaque import OPAQUE, call_of

aten = torch.ops.aten


def apply_rule(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Apply the rule of a call of the step, and return the result as Values of this worker's graph."""
    target = node.target
    if target is OPAQUE:
        return opaque(p, node, args, kwargs)
    if isinstance(target, torch._ops.OpOverload) and target._schema.name in OTHERS:
        return OTHERS[target._schema.name](p, node, args, kwargs)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return p.fallback(node, args, kwargs, f"{target} has no tensor-parallel rule")
    name = target._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or view_rules.RULES.get(name)
    if (rule is None and name.removesuffix("_") in SAME_PLACE) or (torch.Tag.pointwise in target.tags and rule is None):
        rule = pointwise
    if rule is None or (name == "view" and target is aten.view.dtype):
        return p.fallback(node, args, kwargs, f"{name} has no tensor-parallel rule")
    return rule(p, node, args, kwargs)


def aligned(shape: Sequence[int], output: Sequence[int]) -> Labels:
    """Label the dimensions of a broadcast input by their distance from the last one; None where it is broadcast."""
    offset = len(output) - len(shape)
    return tuple(
        f"d{len(output) - offset - dim}" if size == output[offset + dim] else None for dim, size in enumerate(shape)
    )


def pointwise(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Elementwise operations, with broadcasting."""
    if any(isinstance(value, PlacedValue) for value in kwargs.values()):
        return p.fallback(node, args, kwargs, f"{node.target} takes a tensor by name")
    like = node.meta["val"]
    inputs = {i: aligned(arg.shape, like.shape) for i, arg in enumerate(args) if isinstance(arg, PlacedValue)}
    if not inputs:
        return p.fallback(node, args, kwargs, "")
    writes = writes_in_place(node)
    if list(inputs) == [0] and p.takes_form(args[0]) and args[0].shape == tuple(like.shape) and not writes:
        return p.form(node.target, args, kwargs, like=like, dims=range(like.dim()))  # type: ignore[arg-type]
    if _sums(node, args, like):
        return p.emit(node.target, args, kwargs, like=like, placement=PARTIAL)  # type: ignore[arg-type]
    return p.labelled(
        node.target,  # type: ignore[arg-type]
        args,
        kwargs,
        inputs,
        aligned(like.shape, like.shape),
        like=like,
        keep=0 if writes else None,
    )


def _sums(node: fx.Node, args: list[Any], like: Tensor) -> bool:
    """Return whether an addition of partial sums can stay a partial sum, so that one all-reduce serves both."""
    return node.target is aten.add.Tensor and all(
        isinstance(v, PlacedValue) and isinstance(v.placement, Partial) and v.shape == tuple(like.shape) for v in args
    )


# ---- matmuls --------------------------------------------------------------------------------------------------------


def linear(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """linear: x (..., i) times weight (o, i) transposed, plus bias (o)."""
    x, weight, bias = _padded(args, 3)
    like = node.meta["val"]
    batch = tuple(f"b{dim}" for dim in range(len(x.shape) - 1))
    labels: dict[int, Labels] = {0: (*batch, "i"), 1: ("o", "i"), 2: ("o",)}
    if len(weight.shape) != 2:
        return p.fallback(node, args, kwargs, "a linear layer with one output")
    return _product(p, aten.linear.default, [x, weight], bias, labels, (*batch, "o"), like)


def _product(
    p: Partitioner,
    function: Any,
    args: list[Any],
    bias: PlacedValue | None,
    labels: dict[int, Labels],
    output: Labels,
    like: Any,
    bias_shape: tuple[int, ...] | None = None,
) -> PlacedValue:
    """Emit a matmul or convolution with weight labels "o" and "i".

    A bias is added after the all-reduce if "i" is sharded.
    """
    inputs = {0: labels[0], 1: labels[1]}
    label, _, _ = p.choose(list(args), inputs, ("o", "i"), None)
    if bias is None or label != "i":
        if bias is not None:
            inputs[2] = labels[2]
        full = [*args[:2], bias, *args[3:]] if bias is not None or len(args) > 2 else args
        return p.labelled(function, full, None, inputs, output, like=like, weights=("o", "i"))
    total = p.labelled(function, [*args[:2], None, *args[3:]], None, inputs, output, like=like, weights=("o", "i"))
    total = p.settled(total)
    if bias_shape is not None:
        bias = p.settled(bias)
        bias = p.emit(aten.reshape.default, (bias, bias_shape), like=torch.empty(bias_shape, device="meta"))
    inputs = {0: aligned(total.shape, like.shape), 1: aligned(bias.shape, like.shape)}
    return p.labelled(_biased, [total, bias], None, inputs, aligned(like.shape, like.shape), like=like)


def _biased(total: Tensor, bias: Tensor) -> Tensor:
    """Add a bias in the dtype of the products, as a layer does under autocast."""
    return total + bias.to(total.dtype)


def matmul(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """matmul, mm, bmm: a (..., m, k) times b (..., k, n)."""
    a, b = args[:2]
    if len(a.shape) < 2 or len(b.shape) < 2:
        return p.fallback(node, args, kwargs, "a product with a vector")
    like = node.meta["val"]
    batch = like.shape[:-2]
    inputs: dict[int, Labels] = {
        0: (*aligned(a.shape[:-2], batch), "m", "k"),
        1: (*aligned(b.shape[:-2], batch), "k", "n"),
    }
    output = (*aligned(batch, batch), "m", "n")
    weights: tuple[str, ...] = ("n", "k") if _is_weight(b) else ("m", "k") if _is_weight(a) else ()
    return p.labelled(node.target, [a, b], kwargs, inputs, output, like=like, weights=weights)  # type: ignore[arg-type]


def _is_weight(value: PlacedValue) -> bool:
    return value.tensor is not None and len(value.shape) > 1


def grouped_matmul(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """_grouped_mm(a (rows, k), b (groups, k, n), ends): each matrix of b multiplies a run of consecutive rows of a."""
    a, b, ends, *rest = _padded(args, 3)
    ends = kwargs.get("offs", ends)
    if len(a.shape) != 2 or len(b.shape) != 3 or ends is None or any(item is not None for item in rest):
        return p.fallback(node, args, kwargs, "a grouped product of another kind")
    inputs: dict[int, Labels] = {0: (None, "k"), 1: (None, "k", "n"), 2: (None,)}
    like, function = node.meta["val"], bound(_grouped_mm, node.target)
    return p.labelled(function, [a, b, ends], None, inputs, (None, "n"), like=like, weights=("n", "k"))


def _grouped_mm(product: Any, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    result: Tensor = product(a, b, ends)
    return result


def addmm(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """addmm: bias + a (m, k) times b (k, n)."""
    bias, a, b = args[:3]
    if kwargs or len(args) > 3:
        return p.fallback(node, args, kwargs, "addmm with factors")
    labels: dict[int, Labels] = {0: ("m", "i"), 1: ("i", "o"), 2: ("o",)}
    return _product(p, biased_product, [a, b], bias, labels, ("m", "o"), node.meta["val"])


@local
def biased_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a @ b, plus a bias if there is one."""
    return a @ b if bias is None else torch.addmm(bias, a, b)


def einsum(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """einsum: the letters of the equation are the labels."""
    equation = args[0].replace(" ", "")
    operands = list(args[1])
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        return p.fallback(node, args, kwargs, "einsum without an explicit result")
    inputs = {index: tuple(term) for index, term in enumerate(terms.split(","))}
    weights: tuple[str, ...] = ()
    for index, labels in inputs.items():
        if _is_weight(operands[index]):
            weights = tuple(letter for letter in labels if letter in result) + tuple(
                letter for letter in labels if letter not in result
            )
    function = bound(_einsum, equation)
    return p.labelled(function, operands, None, inputs, tuple(result), like=node.meta["val"], weights=weights)


@local
def _einsum(equation: str, *operands: Tensor) -> Tensor:
    return torch.einsum(equation, *operands)


def convolution(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """conv1d, conv2d, conv3d: x (n, i, ...), weight (o, i / groups, ...)."""
    return _convolution(p, node, args, kwargs, transposed=False)


def transposed_convolution(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """conv_transpose1d, 2d, 3d: x (n, i, ...), weight (i, o / groups, ...)."""
    return _convolution(p, node, args, kwargs, transposed=True)


def _convolution(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any], *, transposed: bool) -> Any:
    x, weight, bias, *rest = [*args, None][: max(len(args), 3)]
    groups = rest[3] if len(rest) > 3 else 1
    like = node.meta["val"]
    space = (None,) * (len(weight.shape) - 2)
    if kwargs or len(x.shape) != len(weight.shape):
        return p.fallback(node, args, kwargs, "a convolution without a batch dimension")
    sides: Labels = ("i", "o") if transposed else ("o", "i")
    if groups == 1:
        labels: dict[int, Labels] = {0: ("n", "i", *space), 1: (*sides, *space), 2: ("o",)}
        shape = (-1 if bias is None else bias.shape[0], *(1,) * len(space))
        return _product(p, node.target, [x, weight, None, *rest], bias, labels, ("n", "o", *space), like, shape)
    if groups % p.ranks or x.shape[1] != groups or like.shape[1] != groups:
        return p.fallback(node, args, kwargs, f"a convolution in {groups} groups")
    rest[3] = groups // p.ranks
    depthwise: dict[int, Labels] = {0: ("n", "g", *space), 1: ("g", None, *space)}
    if bias is not None:
        depthwise[2] = ("g",)
    return p.labelled(
        node.target,  # type: ignore[arg-type]
        [x, weight, bias, *rest],
        None,
        depthwise,
        ("n", "g", *space),
        like=like,
        weights=("g",),
    )


def embedding(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """embedding: weight (words, features), sharded by words, or by features if the degree does not divide the words."""
    weight, index, padding, by_frequency, sparse = _padded(args, 5, (None, None, -1, False, False))
    like = node.meta["val"]
    if by_frequency or sparse:
        return p.fallback(node, args, kwargs, "embedding gradients that are sparse or scaled by frequency")
    index = p.replicated(index)
    if p.ranks > 1 and p.undecided(weight):
        words = p.spans(weight, 0)
        if Sharded(0, words).fits(p.ranks):
            weight = p.sharded(weight, 0, words)
        elif p.spans(weight, 1) and weight.shape[1] % p.ranks == 0:
            weight = p.sharded(weight, 1, (weight.shape[1],))
    weight = p.settled(weight)
    where = weight.placement
    if isinstance(where, Sharded) and where.dim == 0:
        function = bound(vocab_parallel.embedding, p.exchange)
        return p.emit(function, (weight, index, padding, where.spans), like=like, placement=PARTIAL)
    placement = where.at(like.dim() - 1) if isinstance(where, Sharded) else where
    return p.emit(aten.embedding.default, (weight, index, padding), like=like, placement=placement)


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """scaled_dot_product_attention: query (..., heads, t, d), key and value (..., heads, s, d).

    The mask is broadcast to (..., heads, t, s).
    """
    query, key, value, mask, dropout, causal = _padded(args, 6, (None, None, None, None, 0.0, False))
    dropout, causal = kwargs.get("dropout_p", dropout), kwargs.get("is_causal", causal)
    mask = kwargs.get("attn_mask", mask)
    scale, grouped = kwargs.get("scale"), kwargs.get("enable_gqa", False)
    query, key, value = (p.settled(item) for item in (query, key, value))
    grouped = grouped and key.shape[-3] != query.shape[-3]
    if grouped and (p.ranks > 1 or (dropout and p.step.training)):
        key, value = (_heads(p, query, item) for item in (key, value))
        grouped = False
    like = node.meta["val"]
    batch = like.shape[:-2]
    scores = (*batch, query.shape[-2], key.shape[-2])
    lead = aligned(batch, batch)
    inputs: dict[int, Labels] = {
        0: (*lead, None, None),
        1: (*aligned(key.shape[:-2], batch), None, None),
        2: (*aligned(value.shape[:-2], batch), None, None),
    }
    if mask is not None:
        inputs[3] = (*aligned(mask.shape[:-2], batch), None, None)
    full = [query, key, value, mask]
    heads = query.shape[-3] if len(query.shape) > 3 else 1
    if heads > 1 and heads % p.ranks:  # sharded within heads, it would be gathered
        p.obstacles.append(Obstacle("query heads", heads))
    if dropout and p.step.training:
        return _attention_with_dropout(p, full, inputs, (*lead, None, None), like, scores, dropout, causal, scale)
    function = bound(_attention, causal, scale, grouped)
    return p.labelled(function, full, None, inputs, (*lead, None, None), like=like)


@local
def _attention(
    causal: bool, scale: float | None, grouped: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


def _attention_with_dropout(
    p: Partitioner,
    full: list[Any],
    inputs: dict[int, Labels],
    output: Labels,
    like: Any,
    scores: tuple[int, ...],
    dropout: float,
    causal: bool,
    scale: float | None,
) -> PlacedValue:
    site, p.sites = p.sites, p.sites + 1
    label, spans, origin = p.choose(list(full), inputs, (), None)
    placement: Placement = REPLICATED if label is None else Sharded(output.index(label), spans, origin)
    args = [*full, dropout, causal, scale, site, scores, placement]
    return p.labelled(p.replacements.attention, args, None, inputs, output, like=like)


def _heads(p: Partitioner, query: PlacedValue, item: PlacedValue) -> PlacedValue:
    """Repeat key or value heads, so that each query head of this worker has one."""
    dim = len(item.shape) - 3
    times = query.shape[-3] // item.shape[-3]
    shape = (*item.shape[:dim], query.shape[-3], *item.shape[dim + 1 :])
    like = torch.empty(shape, dtype=item.dtype, device="meta")
    where = item.placement
    if isinstance(where, Sharded) and where.dim == dim:
        wider = Sharded(dim, tuple(size * times for size in where.spans))
        return p.emit(aten.repeat_interleave.self_int, (item, times, dim), like=like, placement=wider)
    return p.emit(aten.repeat_interleave.self_int, (item, times, dim), like=like, placement=where)


# ---- normalisation, operations along one dimension, reductions ------------------------------------------------------


def layer_norm(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """layer_norm and rms_norm (x, normalized_shape, weight, bias, ...): the leading dimensions are independent."""
    x, shape = args[0], args[1]
    lead = len(x.shape) - len(shape)
    labels: Labels = (*(f"b{dim}" for dim in range(lead)), *(None,) * len(shape))
    inputs: dict[int, Labels] = {0: labels}
    for index in (2, 3):
        if index < len(args) and isinstance(args[index], PlacedValue):
            inputs[index] = (None,) * len(shape)
    return p.labelled(node.target, args, kwargs, inputs, labels, like=node.meta["val"])  # type: ignore[arg-type]


def group_norm(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """group_norm(x (n, c, ...), groups, weight, bias, eps, cudnn): a worker's channels must be whole groups."""
    x, groups, like = p.settled(args[0]), args[1], node.meta["val"]
    labels = ("n", "c", *(None,) * (len(x.shape) - 2))
    inputs: dict[int, Labels] = {0: labels}
    inputs.update({i: ("c",) for i in (2, 3) if i < len(args) and isinstance(args[i], PlacedValue)})
    full = [x, *args[1:]]
    label, spans, _ = p.choose(list(full), inputs, (), None)
    if label == "c":
        size = x.shape[1] // groups * p.ranks
        if any(span % size for span in spans):
            return p.fallback(node, full, kwargs, "")
        full[1] = groups // p.ranks
    return p.labelled(node.target, full, kwargs, inputs, labels, like=like)  # type: ignore[arg-type]


def prelu(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """prelu(x (n, c, ...), weight (c) or (1)): sharded by samples or channels."""
    x, weight = args[:2]
    labels: Labels = ("n", "c", *(None,) * (len(x.shape) - 2)) if len(x.shape) > 1 else (None,)
    inputs: dict[int, Labels] = {0: labels, 1: ("c",) if weight.shape[0] > 1 and len(x.shape) > 1 else (None,)}
    return p.labelled(node.target, args, kwargs, inputs, labels, like=node.meta["val"])  # type: ignore[arg-type]


def batch_norm(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """batch_norm(x (n, c, ...), weight, bias, running mean, running var, training, momentum, eps, cudnn)."""
    training, momentum, eps = args[5], args[6], args[7]
    x = args[0]
    labels = ("n", "c", *(None,) * (len(x.shape) - 2))
    inputs: dict[int, Labels] = {0: labels}
    inputs.update({i: ("c",) for i in range(1, 5) if isinstance(args[i], PlacedValue)})
    if training:
        full = [*args[:5], momentum, eps]
        return p.labelled(p.replacements.batch_norm, full, None, inputs, labels, like=node.meta["val"])
    return p.labelled(node.target, args, kwargs, inputs, labels, like=node.meta["val"])  # type: ignore[arg-type]


def instance_norm(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """instance_norm(x (n, c, ...), weight, bias, running mean, running var, ...): each sample and channel by itself."""
    labels = ("n", "c", *(None,) * (len(args[0].shape) - 2))
    inputs: dict[int, Labels] = {0: labels}
    inputs.update({i: ("c",) for i in range(1, 5) if isinstance(args[i], PlacedValue)})
    return p.labelled(node.target, args, kwargs, inputs, labels, like=node.meta["val"])  # type: ignore[arg-type]


def along(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """softmax, cumsum, roll, ... (x, dim or dims, ...): every other dimension is independent."""
    x, like = args[0], node.meta["val"]
    dims = _dims(args, kwargs, len(x.shape), at=2 if node.target is aten.roll.default else 1)
    labels: Labels = tuple(None if dim in dims else f"b{dim}" for dim in range(len(x.shape)))
    return p.labelled(node.target, args, kwargs, {0: labels}, labels, like=like)  # type: ignore[arg-type]


def _dims(args: list[Any], kwargs: dict[str, Any], rank: int, at: int = 1) -> set[int]:
    given = args[at] if len(args) > at else kwargs.get("dim", kwargs.get("dims"))
    if given is None or given == []:
        return set(range(rank))
    return {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])} if rank else set()


def reduction(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """sum, mean, amax, ... (x, dims, keepdim): a sum over the sharded dimension gives a partial sum."""
    x, like = args[0], node.meta["val"]
    if not isinstance(like, Tensor):
        return p.fallback(node, args, kwargs, f"{node.target} gives several results")
    rank = len(x.shape)
    whole = len(node.target._schema.arguments) < 3  # type: ignore[union-attr]
    dims = set(range(rank)) if whole else _dims(args, kwargs, rank)
    adds = node.target._schema.name == "aten::sum"  # type: ignore[union-attr]
    labels: Labels = tuple(None if dim in dims and not adds else f"b{dim}" for dim in range(rank))
    kept = like.dim() == rank
    output = tuple(None if dim in dims else label for dim, label in enumerate(labels) if kept or dim not in dims)
    return p.labelled(node.target, args, kwargs, {0: labels}, output, like=like)  # type: ignore[arg-type]


def spatial(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Pooling and resizing: samples and channels are independent."""
    x, like = args[0], node.meta["val"]
    if not isinstance(like, Tensor) or like.dim() != len(x.shape):
        return p.fallback(node, args, kwargs, f"{node.target} gives several results")
    labels = (
        ("n", "c", *(None,) * (len(x.shape) - 2)) if len(x.shape) > 3 or _spatial_1d(node) else (None,) * len(x.shape)
    )
    return p.labelled(node.target, args, kwargs, {0: labels}, labels, like=like)  # type: ignore[arg-type]


def _spatial_1d(node: fx.Node) -> bool:
    return "1d" in node.target._schema.name  # type: ignore[union-attr]


def pad(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """pad(x, amounts, ...): only the last len(amounts) / 2 dimensions change."""
    x, changed = args[0], len(args[1]) // 2
    rank = len(x.shape)
    labels: Labels = tuple(f"b{dim}" if dim < rank - changed else None for dim in range(rank))
    return p.labelled(node.target, args, kwargs, {0: labels}, labels, like=node.meta["val"])  # type: ignore[arg-type]


# ---- random numbers, opaque modules, loss ---------------------------------------------------------------------------


def dropout(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """dropout, feature_dropout: the mask depends on the position of the elements, see
    `parallel.operators.graph_operators`.
    """
    x, probability, training = args[:3]
    like = node.meta["val"]
    x = p.settled(x)
    if not training or not probability:
        return x
    site, p.sites = p.sites, p.sites + 1
    features = 2 if "feature" in node.target._schema.name else 0  # type: ignore[union-attr]
    merged = len(x.shape) == 3 and "multi_head_attention_forward" in (node.meta.get("stack_trace") or "")
    full = (x, probability, site, x.shape, x.placement, features, merged)
    return p.emit(p.replacements.dropout, full, like=like, placement=x.placement)


def draws_keyed(name: str, kwargs: Mapping[str, Any], *, through: bool) -> bool:
    """Return whether a call of a function of KEYED can draw by sample and place.

    A generator or an output of its own, and overwriting a tensor that a gradient flows through, are left to torch.

    Args:
        name: the function.
        kwargs: keyword arguments of the call.
        through: whether a gradient flows through its first argument.
    """
    overwritten = name.endswith("_") and through
    return kwargs.get("generator") is None and kwargs.get("out") is None and not overwritten


def random_numbers(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """rand, bernoulli_, normal_, ...: every worker draws all of it, see `parallel.operators.random_numbers`."""
    name = node.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
    if not draws_keyed(name, kwargs, through=bool(args) and isinstance(args[0], PlacedValue) and args[0].grad):
        return unkeyed_random_numbers(p, node, args, kwargs)
    site, p.sites = p.sites, p.sites + 1
    whole = [p.replicated(item) if isinstance(item, PlacedValue) else item for item in args]
    drawn = p.emit(p.replacements.draw, (name, site, *whole), kwargs, like=node.meta["val"])
    drawn.grad = drawn.node.meta["grad"] = False
    return drawn


def unkeyed_random_numbers(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """multinomial, randperm, ...: computed unchanged from torch's generator, which workers do not share.

    Adds a note.
    """
    p.note(f"{node.target} draws from torch's own generator: not the same numbers as in one process")
    return p.fallback(node, args, kwargs, "")


def opaque(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A module or function that is not traced: called as a whole on every worker."""
    call = call_of(args[1])
    p.note(f"{call.reason}: it is computed whole on every worker of tp, and in one stage of pp")
    with p.because(call.reason):
        tensors = [p.replicated(value) for value in args[0]]
    site, p.sites = p.sites, p.sites + call.draws
    function, likes = bound(p.replacements.opaque, call, site), list(node.meta["val"])
    whole = [REPLICATED] * len(likes)
    return p.emit_many(function, tensors, like=likes, placements=whole, carries=call.differentiable)


def cross_entropy(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing).

    The logits may be sharded by classes.
    """
    logits, target, weight, mode, ignore, smoothing = _padded(args, 6, (None, None, None, 1, -100, 0.0))
    logits = p.settled(logits)
    where = logits.placement
    dim = 1 if len(logits.shape) > 1 else 0
    if (
        not isinstance(where, Sharded)
        or where.dim != dim
        or weight is not None
        or target.dtype.is_floating_point
        or kwargs
    ):
        return p.fallback(node, args, kwargs, "")
    function = bound(vocab_parallel.cross_entropy, p.exchange)
    full = (logits, p.replicated(target), where.spans, mode, ignore, smoothing)
    return p.emit(function, full, like=node.meta["val"])


def _padded(args: list[Any], count: int, defaults: Sequence[Any] | None = None) -> list[Any]:
    defaults = defaults or (None,) * count
    return [*args, *defaults[len(args) :]]


SAME_PLACE = set(
    "to _to_copy contiguous clone detach alias type_as lift_fresh_copy lift_fresh masked_fill zeros_like ones_like "
    "full_like empty_like where fill zero float type gelu silu relu leaky_relu elu hardtanh hardswish softplus prelu "
    "rsub square".split()
)
"""Elementwise operations that torch does not tag as pointwise."""

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_ALONG = ("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "roll", "flip")
_REDUCTIONS = tuple("sum mean amax amin var std prod argmax argmin any all norm logsumexp".split())
_SPATIAL = (
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in "nearest1d nearest2d nearest3d bilinear2d bicubic2d trilinear3d".split()),
)
KEYED = tuple(
    "rand randn rand_like randn_like randint randint_like bernoulli bernoulli_ uniform_ normal_ exponential_".split()
)
"""Functions whose random numbers are drawn by sample and place, see `parallel.operators.random_numbers`."""

_UNKEYED = ("multinomial", "normal", "alpha_dropout", "feature_alpha_dropout", "rrelu", "randperm")
RULES: dict[str, Rule] = {
    "linear": linear,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "addmm": addmm,
    "_grouped_mm": grouped_matmul,
    "einsum": einsum,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    "prelu": prelu,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "pad": pad,
    "constant_pad_nd": pad,
    "dropout": dropout,
    "dropout_": dropout,
    "feature_dropout": dropout,
    "feature_dropout_": dropout,
    "cross_entropy_loss": cross_entropy,
    **dict.fromkeys(_CONVOLUTIONS, convolution),
    **dict.fromkeys(_TRANSPOSED, transposed_convolution),
    **dict.fromkeys(_ALONG, along),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(KEYED, random_numbers),
    **dict.fromkeys(_UNKEYED, unkeyed_random_numbers),
}

OTHERS: dict[str, Rule] = {"transformers::grouped_mm_fallback": grouped_matmul}
"""Operators that libraries define for tracing, by their full names."""
