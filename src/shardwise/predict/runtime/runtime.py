"""Training software as a value: which kernels it runs, what it overlaps, and what it holds in memory.

Predictions read a runtime from the profile that they are of. Shardwise's own program is one value (`SHARDWISE`), other
software is others (`known.py`); no formula asks for a name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardwise.options import AUTOCAST, BF16, FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Behaviour of training software, as far as it matters for time and memory. The defaults are Shardwise's.

    Attributes:
        name: name of the software.
        source: where its properties were read.
        kernels: whether the kernels of a transformer are those that `runtime.block` lists; False: the traced ones.
        attention: `unfused` (products with a fused softmax between), `flash`, `fused` (cuDNN or flash attention 3 on
            Hopper and later).
        elementwise: `megatron` (fused bias, dropout and residual), `eager`, `compiled`, `te` (Transformer Engine).
        loss: `megatron` (vocabulary-parallel, float32 in steps), `eager` (float32 in two steps), `fused`.
        dropout: whether dropout runs.
        causal: whether flash attention skips the masked half.
        fused_accumulation: whether products add to the accumulated gradients themselves.
        fused_norms: whether a root mean square norm is one kernel; those of elementary operations are many.
        norm_inputs: whether norms keep their input for the backward pass; memory-efficient ones use their output.
        stops_early: whether recomputing a block ends with the last tensor that its backward pass needs, before the last
            product (torch.utils.checkpoint without reentry; Megatron-LM's own checkpoint repeats everything).
        padded: whether the vocabulary is padded to a multiple of 128 for each tensor-parallel rank.
        sequence_parallel: whether tensor parallelism always comes with sequence parallelism.
        overlap_tensor: whether products are cut so that the collectives of tensor parallelism hide behind their parts.
        async_tensor: whether the backward pass reduces gradients of inputs while it computes those of weights.
        overlap_gradients: whether gradients are reduced during the backward pass.
        overlap_parameters: whether updated parameters of zero=1 are gathered during the next forward pass.
        bucketed: whether zero=1 gathers updated parameters in large buckets instead of tensor by tensor.
        overlap_pipeline: whether messages between stages leave their sender free to compute; otherwise device and host
            wait for them (Megatron-LM's `_communicate` ends with `torch.cuda.synchronize`).
        scatter_pipeline: whether a message between stages is split among the tensor-parallel ranks (Narayanan 2021).
        autocasts: whether parameters stay in float32 and are cast where they are used, instead of being stored in half
            precision beside a copy in float32 that is updated.
        copies: whether each step makes copies in half precision of parameters that stay in float32 and are not split.
        graphs: whether CUDA graphs spare the host from launching.
        fitted_host: whether its host takes `Constants.host_kernel` for a kernel, instead of the device's launch time.
        gradient_bytes: bytes of one element when gradients are reduced; 0: those of the parameter.
        scattered_bytes: bytes of one element when sharded gradients (zero=2, 3) are reduced; 0: `gradient_bytes`.
        gathered_bytes: bytes of one element when parameters are gathered; 0: those of the parameter.
        accumulation_bytes: bytes of one element of accumulated gradients.
        sharded_reduction: whether zero=1 reduces to each rank only what it owns, and gathers parameters; otherwise all
            ranks get all gradients.
        owners: whether zero=1 gives whole tensors to single replicas, which broadcast them; otherwise every replica
            owns an equal part.
        sharded_gradients: whether replicas hold only their part of the gradients (ZeRO-2), beside zero=1's optimizer.
        stages: how a pipeline is cut: `cost` (equal time), `number` (equal number of blocks), `matrices` (by the
            parameters of matrices).
        keeps_outputs: whether a stage keeps its output until the gradient arrives; others free it when it is sent.
        buffers: elements of communication buffers beside tensors.
        own_gradients: whether the optimizer keeps gradients of its own in float32, beside those of the model.
    """

    name: str
    source: str = ""
    kernels: bool = True
    attention: str = "flash"
    elementwise: str = "eager"
    loss: str = "eager"
    dropout: bool = False
    causal: bool = True
    fused_accumulation: bool = False
    fused_norms: bool = True
    norm_inputs: bool = True
    stops_early: bool = False
    padded: bool = False
    sequence_parallel: bool = False
    overlap_tensor: bool = False
    async_tensor: bool = False
    overlap_gradients: bool = True
    overlap_parameters: bool = False
    bucketed: bool = True
    overlap_pipeline: bool = True
    scatter_pipeline: bool = False
    autocasts: bool = False
    copies: bool = False
    graphs: bool = False
    fitted_host: bool = True
    gradient_bytes: int = 0
    scattered_bytes: int = 0
    gathered_bytes: int = 0
    accumulation_bytes: int = 4
    sharded_reduction: bool = True
    owners: bool = False
    sharded_gradients: bool = False
    stages: str = "number"
    keeps_outputs: bool = True
    buffers: int = 0
    own_gradients: bool = False


SHARDWISE = Runtime(
    name="shardwise",
    source="this program",
    kernels=False,
    stops_early=True,
    fitted_host=False,
    autocasts=True,
    owners=True,
    stages="cost",
)
"""Shardwise's own program: kernels are those of the traced module."""

SHARDWISE_AUTOCAST = replace(SHARDWISE, copies=True)
SHARDWISE_BF16 = replace(SHARDWISE_AUTOCAST, gathered_bytes=2)
"""Shardwise's own program where products compute in bfloat16: `fully_shard` casts parameters before it gathers them."""

_OWN = {FLOAT32: SHARDWISE, AUTOCAST: SHARDWISE_AUTOCAST, BF16: SHARDWISE_BF16}


def own_runtime(precision: str, device: str) -> Runtime:
    """Return Shardwise's own program in a precision on a kind of device, `gpu` or `cpu`.

    On a CPU a stage holds what it sent until it hears from the receiver, which is about when the gradient arrives.
    """
    return replace(_OWN[precision], keeps_outputs=device == "cpu")
