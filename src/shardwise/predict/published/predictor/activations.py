"""Bytes of activations: what a block keeps of a microbatch for its backward pass, and what passes need for a moment.

With T tokens, hidden size h, width f of the MLP, a heads, sequence s, w bytes per element, tensor parallelism t
(Korthikanti et al. 2022, section 4; there w = 2, f = 4h and dropout give T h (10 + 24/t + 5 a s/(h t))):

    residual stream   inputs of the norms and of the first products, masks of dropout      (4 w + 2) h      / t with sp
    inside            queries, keys, values, output of attention, MLP                      (qkv + h + 2f) w / t
    scores            softmax, mask and output of its dropout, where attention is unfused   (2 w + 1) a s    / t
"""

from __future__ import annotations

from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.published.predictor.sizes import Setup, Sizes

LOGIT_FLOAT_BYTES = {"megatron": 8, "eager": 12, "fused": 4}
"""Bytes per logit at the peak of the loss, beside the logits themselves: copies in float32. Megatron's has logits and
softmax, PyTorch's logits, log softmax and its gradient; in fused ones the gradient overwrites what was there."""

EAGER_GATED = 4
"""Tensors as wide as the MLP that a gated one keeps in eager PyTorch: both halves of the first product, the activated
gate and the product of both. Fused activations compute the third again."""


def width(setup: Setup) -> int:
    """Bytes of one element of an activation."""
    return int(ELEMENT_BYTES[setup.dtype])


def tokens(sizes: Sizes, setup: Setup) -> int:
    """Tokens of a microbatch on one rank of context parallelism."""
    return setup.micro_batch * sizes.sequence // setup.context


def block_entry(sizes: Sizes, setup: Setup) -> float:
    """The input of a block: all that is kept of it where it is computed again."""
    return tokens(sizes, setup) * sizes.hidden * width(setup) / _spread(setup)


def block_saved(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes that a block saves of a microbatch for the backward pass, without recomputation."""
    return tokens(sizes, setup) * (_residual(sizes, setup) + _inside(sizes, setup) + _scores(sizes, setup))


def saved(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes that a block saves of a microbatch for the backward pass, the mean over all blocks."""
    entry = block_entry(sizes, setup)
    whole = block_saved(sizes, setup)
    if setup.recompute == "full":
        return entry
    if setup.recompute == "layers":
        return (entry + whole) / 2
    if setup.recompute == "selective":
        return whole - tokens(sizes, setup) * _scores(sizes, setup)
    if setup.recompute == "operations":
        return entry + tokens(sizes, setup) * _operations(sizes, setup)
    return whole


def backward_moment(sizes: Sizes, setup: Setup) -> float:
    """Return the bytes that a block's backward pass needs beside what is saved: gradients and recomputed tensors."""
    w, t = width(setup), setup.tensor
    mlp = w * (sizes.ffn + sizes.up) / t
    attention = w * (sizes.qkv + sizes.hidden) / t
    if setup.stack.attention == "unfused":
        attention += 2 * w * sizes.heads * sizes.sequence / t
    gradients = tokens(sizes, setup) * (max(mlp, attention) + w * sizes.hidden)
    again = {"none": 0.0, "selective": tokens(sizes, setup) * _scores(sizes, setup)}
    return gradients + again.get(setup.recompute, block_saved(sizes, setup))


def loss_moment(sizes: Sizes, setup: Setup) -> float:
    """Logits and what the loss makes of them, with the input of the output layer."""
    elements = tokens(sizes, setup) * setup.columns(sizes.vocab)
    copies = 3 if setup.stack.deepspeed else 1  # its pipeline keeps outputs, and the loss lays them out anew
    per_logit = copies * width(setup) + LOGIT_FLOAT_BYTES[setup.stack.loss]
    return elements * per_logit + tokens(sizes, setup) * sizes.hidden * width(setup) * 2


def _spread(setup: Setup) -> int:
    """Ranks that share the residual stream."""
    return setup.tensor if setup.sequence_parallel else 1


def _residual(sizes: Sizes, setup: Setup) -> float:
    w, masks = width(setup), 2 if setup.stack.dropout else 0
    inputs = 2 * w if setup.stack.norm_inputs else 0
    narrow = ELEMENT_BYTES[setup.linear_dtype] if setup.linear_dtype in ("fp8", "fp4") else w
    return sizes.hidden * (inputs + 2 * narrow + masks) / _spread(setup)


def _inside(sizes: Sizes, setup: Setup) -> float:
    w, eager = width(setup), setup.stack.elementwise == "eager"
    attention = sizes.qkv + sizes.hidden
    if eager and not sizes.learned_positions:  # queries and keys before and after their rotation
        attention += sizes.hidden + sizes.kv_heads * sizes.head_size
    wide = (EAGER_GATED if eager else 3) if sizes.gated else 2
    return w * (attention + wide * sizes.ffn) / setup.tensor


def _scores(sizes: Sizes, setup: Setup) -> float:
    if setup.stack.attention != "unfused":
        return 4.0 * sizes.heads / setup.tensor  # the logarithm of each row's sum
    w = width(setup)
    return sizes.heads * sizes.sequence * (2 * w + 1 if setup.stack.dropout else w) / setup.tensor


def _operations(sizes: Sizes, setup: Setup) -> float:
    """Outputs of attention and of every second product in turn: torchtitan's selective checkpointing by operation."""
    outputs = sum(outputs for _, outputs in sizes.linears()[::2])
    return width(setup) * (sizes.hidden + outputs) / setup.tensor
