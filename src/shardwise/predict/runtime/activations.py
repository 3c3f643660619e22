"""Bytes of activations: what a block keeps of a microbatch for its backward pass, and what passes need for a moment.

With T tokens, hidden size h, width f of the MLP, a heads, sequence s, w bytes per element, tensor parallelism t
(Korthikanti et al. 2022, section 4; there w = 2, f = 4h and dropout give T h (10 + 24/t + 5 a s/(h t))):

    residual stream   inputs of the norms and of the first products, masks of dropout      (4 w + 2) h      / t with sp
    inside            queries, keys, values, output of attention, MLP                      (qkv + h + 2f) w / t
    scores            softmax, mask and output of its dropout, where attention is unfused   (2 w + 1) a s    / t
"""

from __future__ import annotations

from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.runtime.sizes import Computation, Sizes

LOGIT_FLOAT_BYTES = {"megatron": 8, "eager": 12, "fused": 4}
"""Bytes per logit at the peak of the loss, beside the logits themselves: copies in float32. Megatron's has logits and
softmax, PyTorch's logits, log softmax and its gradient; in fused ones the gradient overwrites what was there."""

EAGER_GATED = 4
"""Tensors as wide as the MLP that a gated one keeps in eager PyTorch: both halves of the first product, the activated
gate and the product of both. Fused activations compute the third again."""


def block_entry(sizes: Sizes, how: Computation) -> float:
    """The input of a block: all that is kept of it where it is computed again."""
    return how.tokens(sizes) * sizes.hidden * how.width / _spread(how)


def block_saved(sizes: Sizes, how: Computation) -> float:
    """Return the bytes that a block saves of a microbatch for the backward pass, without recomputation."""
    return how.tokens(sizes) * (_residual(sizes, how) + _inside(sizes, how) + _scores(sizes, how))


def saved(sizes: Sizes, how: Computation) -> float:
    """Return the bytes that a block saves of a microbatch for the backward pass."""
    entry = block_entry(sizes, how)
    whole = block_saved(sizes, how)
    if how.recompute == "full":
        return entry
    if how.recompute == "selective":
        return whole - how.tokens(sizes) * _scores(sizes, how)
    if how.recompute == "operations":
        return entry + how.tokens(sizes) * _operations(sizes, how)
    return whole


def backward_moment(sizes: Sizes, how: Computation) -> float:
    """Return the bytes that a block's backward pass needs beside what is saved: gradients and recomputed tensors."""
    w, t = how.width, how.tensor
    mlp = w * (sizes.ffn + sizes.up) / t
    attention = w * (sizes.qkv + sizes.hidden) / t
    if how.runtime.attention == "unfused":
        attention += 2 * w * sizes.heads * sizes.sequence / t
    gradients = how.tokens(sizes) * (max(mlp, attention) + w * sizes.hidden)
    again = {"none": 0.0, "selective": how.tokens(sizes) * _scores(sizes, how)}
    return gradients + again.get(how.recompute, block_saved(sizes, how))


def loss_moment(sizes: Sizes, how: Computation) -> float:
    """Logits and what the loss makes of them, with the input of the output layer."""
    elements = how.tokens(sizes) * how.columns(sizes.vocab)
    copies = 3 if how.runtime.keeps_outputs else 1  # the output that is kept, and the loss lays it out anew
    per_logit = copies * how.width + LOGIT_FLOAT_BYTES[how.runtime.loss]
    return elements * per_logit + how.tokens(sizes) * sizes.hidden * how.width * 2


def _spread(how: Computation) -> int:
    """Ranks that share the residual stream."""
    return how.tensor if how.sequence_parallel else 1


def _residual(sizes: Sizes, how: Computation) -> float:
    w, masks = how.width, 2 if how.runtime.dropout else 0
    inputs = 2 * w if how.runtime.norm_inputs else 0
    narrow = ELEMENT_BYTES[how.linear_dtype] if how.linear_dtype in ("fp8", "fp4") else w
    return sizes.hidden * (inputs + 2 * narrow + masks) / _spread(how)


def _inside(sizes: Sizes, how: Computation) -> float:
    w, eager = how.width, how.runtime.elementwise == "eager"
    attention = sizes.qkv + sizes.hidden
    if eager and not sizes.learned_positions:  # queries and keys before and after their rotation
        attention += sizes.hidden + sizes.kv_heads * sizes.head_size
    wide = (EAGER_GATED if eager else 3) if sizes.gated else 2
    return w * (attention + wide * sizes.ffn) / how.tensor


def _scores(sizes: Sizes, how: Computation) -> float:
    if how.runtime.attention != "unfused":
        return 4.0 * sizes.heads / how.tensor  # the logarithm of each row's sum
    w = how.width
    return sizes.heads * sizes.sequence * (2 * w + 1 if how.runtime.dropout else w) / how.tensor


def _operations(sizes: Sizes, how: Computation) -> float:
    """Outputs of attention and of every second product in turn: torchtitan's selective checkpointing by operation."""
    outputs = sum(outputs for _, outputs in sizes.linears()[::2])
    return how.width * (sizes.hidden + outputs) / how.tensor
