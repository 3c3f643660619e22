"""Profile of a transformer as other software runs it: its kernels, exchanges and bytes, from sizes alone.

A chain of segments: the embedding, one segment for each block, and the output with the loss. What is computed again
before a backward pass is part of that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwise.predict.profile.profile import (
    Exchanged,
    Layer,
    LayerPass,
    Parameter,
    Profile,
    Segment,
    Update,
    Value,
)
from shardwise.predict.runtime import activations, ends
from shardwise.predict.runtime.block import block
from shardwise.predict.runtime.element_bytes import WIDE
from shardwise.predict.runtime.sizes import Computation, Sizes

MOMENTS = 8
"""Bytes per parameter of Adam's two moments, which are float32."""

WORKSPACE = 64 * 2**20
"""Bytes that libraries of products keep for themselves: cuBLAS 32 MiB on Hopper, 8 MiB before; Transformer Engine 32"""


def transformer_profile(sizes: Sizes, how: Computation, batch_size: int) -> Profile:
    """Return the profile of a transformer's step on one rank, as `how.runtime` runs it.

    What strategies recompute in full is left to them (`Strategy.recompute`).

    Args:
        sizes: sizes of the model.
        how: how one rank computes a microbatch.
        batch_size: samples of a step, those of each rank of context parallelism counted by themselves.
    """
    whole, again = (_block(sizes, replace(how, recompute=kind)) for kind in _kinds(how))
    layers = [again if number % 2 == 0 else whole for number in range(sizes.layers)]
    segments = [_embedding(sizes, how), *layers, _head(sizes, how)]
    message = _message(sizes, how)
    parameters = _parameters(sizes, how)
    return Profile(
        name="transformer",
        tp=how.tensor,
        sp=int(how.sequence_parallel),
        microbatch=how.micro_batch,
        precision=how.linear_dtype,
        device="gpu",
        batch_size=batch_size,
        segments=tuple(Segment(layer, message if number else 0) for number, layer in enumerate(segments)),
        parameters=parameters,
        values=tuple(_value(sizes, how, number, message) for number in range(sizes.layers + 1)),
        blocks=tuple((1 + sizes.learned_positions + number,) for number in range(sizes.layers)),
        update=Update(
            kernels=(replace(ends.update(1, how), shape=(1,)),),
            state_bytes=MOMENTS,
            together=True,
        ),
        ready=tuple(reversed(range(len(parameters)))),
        runtime=how.runtime,
    )


def _kinds(how: Computation) -> tuple[str, str]:
    """Return the recomputation of odd blocks and of even ones, which differ only if every second one is recomputed."""
    return ("none", "full") if how.recompute == "layers" else (how.recompute, how.recompute)


def _value(sizes: Sizes, how: Computation, made: int, message: int) -> Value:
    """Return the residual stream that a segment hands to the next one, which keeps it for its backward pass."""
    return Value(message, round(activations.block_entry(sizes, how)), made, (made + 1,), (made + 1,))


def _message(sizes: Sizes, how: Computation) -> int:
    amount = how.tokens(sizes) * sizes.hidden * how.width
    return amount // (how.tensor if how.sequence_parallel or how.runtime.scatter_pipeline else 1)


def _parameters(sizes: Sizes, how: Computation) -> tuple[Parameter, ...]:
    """Return what one rank stores: the embeddings, each block in one, and the output with the last norm."""
    last, tp = sizes.layers + 1, how.tensor
    rows = how.columns(sizes.vocab)
    found = [Parameter("embedding", (rows, sizes.hidden), WIDE, (0, last) if sizes.tied else (0,))]
    if sizes.learned_positions:
        found.append(Parameter("positions", (sizes.sequence * sizes.hidden // tp,), WIDE, (0,)))
    found += [
        Parameter(f"block {number}", (round(sizes.layer_parameters / tp),), WIDE, (number + 1,))
        for number in range(sizes.layers)
    ]
    if not sizes.tied:
        found.append(Parameter("output", (rows, sizes.hidden), WIDE, (last,)))
    found.append(Parameter("norm", (sizes.hidden,), WIDE, (last,)))
    return tuple(found)


# ---- layers ---------------------------------------------------------------------------------------------------------


def _block(sizes: Sizes, how: Computation) -> Layer:
    passes = block(sizes, how)
    repeated = tuple(replace(kernel, when="recompute") for kernel in passes.recomputed)
    repeats = 0 if how.recompute != "full" else 1 if how.runtime.stops_early else 2
    again = block(sizes, replace(how, recompute="full")).recomputed
    entry = activations.block_entry(sizes, how)
    return Layer(
        forward=LayerPass(passes.forward, _exchanges(sizes, how, 2)),
        backward=LayerPass((*repeated, *passes.backward), _exchanges(sizes, how, 2 + repeats, backward=True)),
        recomputed=LayerPass(again, _exchanges(sizes, how, 1 if how.runtime.stops_early else 2)),
        inside=round(max(0.0, activations.saved(sizes, how) - entry)),
        temporary_backward=round(activations.backward_moment(sizes, how)) + _kept(how),
    )


def _embedding(sizes: Sizes, how: Computation) -> Layer:
    forward, backward = ends.embedding(sizes, how)
    return Layer(forward=LayerPass(forward), backward=LayerPass(backward), temporary_backward=_kept(how))


def _head(sizes: Sizes, how: Computation) -> Layer:
    forward, backward = ends.head(sizes, how)
    return Layer(
        forward=LayerPass(forward, _reductions(how, 3, 4 * how.tokens(sizes))),
        backward=LayerPass(backward, _reductions(how, 1, _residual(sizes, how))),
        temporary_backward=round(activations.loss_moment(sizes, how)) + _making(sizes, how) + _kept(how),
    )


def _kept(how: Computation) -> int:
    return WORKSPACE + how.runtime.buffers * how.width


def _making(sizes: Sizes, how: Computation) -> int:
    """Return the bytes of the output's gradient while it is made, beside the logits' own; products may add to others"""
    made = 0 if how.runtime.fused_accumulation else how.width
    return made * how.columns(sizes.vocab) * sizes.hidden


def _residual(sizes: Sizes, how: Computation) -> int:
    return how.tokens(sizes) * sizes.hidden * how.width


def _reductions(how: Computation, count: int, amount: int) -> tuple[Exchanged, ...]:
    return (Exchanged("all_reduce", amount),) * count if how.tensor > 1 else ()


def _exchanges(sizes: Sizes, how: Computation, reductions: int, *, backward: bool = False) -> tuple[Exchanged, ...]:
    """Return the collectives of a block's pass: `reductions` sums over tensor-parallel ranks, and the ring of context.

    With sequence parallelism a sum is an all-gather and a reduce-scatter, and the backward pass gathers the inputs of
    two products once more, while it computes (Korthikanti et al. 2022, section 4.2.2).
    """
    found = list(_ring(sizes, how, backward=backward))
    if how.tensor == 1:
        return tuple(found)
    amount, hides = _residual(sizes, how), how.runtime.overlap_tensor
    later = 2 if backward and how.runtime.async_tensor else 0  # while gradients of weights are computed
    sums = [hides] * (reductions - later) + [True] * later
    if not how.sequence_parallel:
        return (*found, *(Exchanged("all_reduce", amount, hidden=each) for each in sums))
    found += [Exchanged("reduce_scatter", amount, hidden=each) for each in sums]
    found += [Exchanged("all_gather", amount, hidden=hides)] * reductions
    return (*found, *[Exchanged("all_gather", amount, hidden=True)] * (2 if backward else 0))


def _ring(sizes: Sizes, how: Computation, *, backward: bool) -> Sequence[Exchanged]:
    """Keys and values go around the ranks of context parallelism while attention runs (Liu et al. 2023)."""
    if how.context == 1:
        return ()
    heads = max(1, sizes.kv_heads // how.tensor)
    amount = 2 * how.micro_batch * sizes.sequence * heads * sizes.head_size * how.width
    ring = Exchanged("all_gather", amount, hidden=True, ranks=how.context, stride=how.tensor)
    return [ring] * (2 if backward else 1)
