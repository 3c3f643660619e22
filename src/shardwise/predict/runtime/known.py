"""Training software that others wrote, each as a `Runtime` with the source of its properties.

What depends on the precision of a run (`in_precision`) or on its options (dropout, CUDA graphs) is set per run.
"""

from __future__ import annotations

from dataclasses import replace

from shardwise.predict.runtime.runtime import Runtime

BUCKETS = 2 * 500_000_000
"""Elements of DeepSpeed's buckets for reducing gradients and gathering parameters, 500 million each unless configured
(deepspeed.ai/docs/config-json, reduce_bucket_size and allgather_bucket_size)."""

MEGATRON_2021 = Runtime(
    name="megatron-2021",
    source="Megatron-LM until 2021 (Narayanan et al. 2021, sections 3 and 4): fused softmax, bias, dropout and GeLU; "
    "gradients reduced after the last pass; point-to-point messages that both sides wait for, scattered over tp",
    attention="unfused",
    elementwise="megatron",
    loss="megatron",
    padded=True,
    overlap_gradients=False,
    overlap_pipeline=False,
    scatter_pipeline=True,
    keeps_outputs=False,
)

MEGATRON_2022 = replace(
    MEGATRON_2021,
    name="megatron-2022",
    source="Megatron-LM of 2022 (Korthikanti et al. 2022, section 4): gradients of inputs are reduced while those of "
    "weights are computed, and products add to the gradients (gradient_accumulation_fusion)",
    async_tensor=True,
    fused_accumulation=True,
)

MEGATRON_DEEPSPEED = replace(
    MEGATRON_2021,
    name="megatron-deepspeed",
    source="Megatron-DeepSpeed (BLOOM, Scao et al. 2022): kernels of Megatron-LM, engine and pipeline of DeepSpeed",
    own_gradients=True,
    keeps_outputs=True,
    buffers=BUCKETS,
)

MEGATRON_CORE = Runtime(
    name="megatron",
    source="Megatron Core with Transformer Engine, as in NeMo (docs.nvidia.com/nemo, performance guide): attention of "
    "cuDNN, fused norms and loss, userbuffer overlap of tp, distributed optimizer with overlapped collectives, "
    "interleaved pipeline with overlapped messages",
    attention="fused",
    elementwise="te",
    loss="fused",
    fused_accumulation=True,
    padded=True,
    sequence_parallel=True,
    overlap_tensor=True,
    async_tensor=True,
    overlap_parameters=True,
    keeps_outputs=False,
)

NEMO_AMPERE = replace(
    MEGATRON_CORE,
    name="nemo-ampere",
    source="NeMo's launcher on A100 (NVIDIA/NeMo-Framework-Launcher 00af8f2, launcher_scripts/conf/training/gpt3): "
    "Megatron Core without the kernels that need Hopper",
    attention="unfused",
    elementwise="megatron",
    loss="megatron",
)

FSDP = Runtime(
    name="accelerate",
    source="fully sharded data parallelism of PyTorch (Zhao et al. 2023) around an eager model with "
    "scaled_dot_product_attention and norms of elementary operations, as in Hugging Face's transformers; "
    "checkpointing without reentry",
    fused_norms=False,
    stops_early=True,
    autocasts=True,
    sequence_parallel=True,
    bucketed=False,
    overlap_pipeline=False,
    keeps_outputs=False,
)

LLM_FOUNDRY = replace(
    FSDP,
    name="llm-foundry",
    source="MosaicML's llm-foundry: FSDP around MPT; that its attention computes the masked half too is assumed, "
    "because of its throughput",
    causal=False,
)

TORCHTITAN = replace(
    FSDP,
    name="torchtitan",
    source="torchtitan (Liang et al. 2024): FSDP2, each block compiled",
    elementwise="compiled",
    fused_norms=True,
    bucketed=True,
)

ACCELERATE = replace(
    FSDP,
    source="accelerate around a module of one's own: DDP, or fully_shard, whose reductions are in the dtype of the "
    "computation (accelerate/utils/dataclasses.py, set_mixed_precision); kernels are those of the traced module",
    kernels=False,
    fitted_host=False,
    keeps_outputs=True,
)

DEEPSPEED = Runtime(
    name="deepspeed",
    source="DeepSpeed's ZeRO around a module of one's own (Rajbhandari et al. 2020; docs/_pages/config-json.md): "
    "parameters in half precision, copies in float32 that are updated, buckets of 500 million elements for gradients, "
    "two of them with overlap_comm; kernels are those of the traced module",
    kernels=False,
    stops_early=True,
    fitted_host=False,
    buffers=BUCKETS,
    own_gradients=True,
)

NANOTRON = replace(
    FSDP,
    name="nanotron",
    source="nanotron (github.com/huggingface/nanotron): kernels for norms, Megatron's vocabulary and loss, stages cut "
    "by `get_block_compute_costs`, all gradients reduced to all ranks under ZeRO-1",
    loss="megatron",
    padded=True,
    fused_norms=True,
    autocasts=False,
    sharded_reduction=False,
    stages="matrices",
)


def in_precision(runtime: Runtime, dtype: str, *, pure: bool = False) -> Runtime:
    """Return the runtime with the bytes of one element that it stores, reduces and gathers in a precision.

    Args:
        runtime: the software.
        dtype: of activations: float32, tf32, bf16 or fp16.
        pure: whether gradients stay in bf16, without a copy in float32.
    """
    half = dtype == "fp16" or (dtype == "bf16" and pure)
    narrow = not runtime.kernels and dtype == "bf16"
    return replace(
        runtime,
        gradient_bytes=2 if half else 4,
        scattered_bytes=2 if narrow else 0,
        accumulation_bytes=2 if dtype == "fp16" else 4,
        gathered_bytes=4 if dtype in ("tf32", "float32") else 2,
    )
