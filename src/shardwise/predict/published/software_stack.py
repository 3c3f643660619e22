"""Software of a row's run, inferred from its source, precision and notes: kernels, and overlap of communication."""

from __future__ import annotations

from shardwise.predict.published import cells
from shardwise.predict.published.columns import Row, text
from shardwise.predict.published.predictor.sizes import Stack

DEEPSPEED = ("deepspeed", "bigscience", "bloom", "vtrain", "sailor")
"""Words that mark sources which ran Megatron-DeepSpeed."""

ENGINE = ("nemo", "megatron-bridge", "transformer engine", "transformerengine")
"""Words that mark sources which ran NVIDIA's Transformer Engine."""


def stack_of(row: Row, dtype: str) -> Stack:
    """Infer the software of a row's run, as far as it matters for time and memory."""
    source = f"{text(row, 'source')} {text(row, 'group')} {row.get('compile')} {row.get('notes')}".lower()
    deepspeed = any(word in source for word in DEEPSPEED)
    old = dtype in ("fp16", "tf32", "float32") or deepspeed
    compiled = text(row, "compile").lower().startswith(("yes", "true", "torch.compile", "on", "1"))
    engine = any(word in source for word in ENGINE) or "TE" in text(row, "compile")
    if old or (engine and "a100" in text(row, "gpu").lower()):
        elementwise, attention, loss = "megatron", "unfused", "megatron"
    elif engine:
        elementwise, attention, loss = "te", "fused", "fused"
    elif compiled:
        elementwise, attention, loss = "compiled", "flash", "eager"
    else:
        elementwise, attention, loss = "eager", "flash", "eager"
    nanotron = "nanotron" in source
    if nanotron:  # the vocabulary and its loss are sharded by Megatron's algorithm
        loss = "megatron"
    nanotron_zero = nanotron and cells.zero(text(row, "zero_fsdp")) > 0  # it reduces gradients only after the pass
    recent = engine or "korthikanti" in source  # Megatron-LM of 2022 and later
    half = dtype == "fp16" or (dtype == "bf16" and "pure" in text(row, "precision").lower())
    return Stack(
        attention=attention,
        elementwise=elementwise,
        loss=loss,
        dropout=dtype == "fp16" or ((old or engine) and dtype == "bf16" and "gpt" in text(row, "model").lower()),
        overlap_gradients=not (old or nanotron_zero) or ("overlapped)" in source and "not overlapped" not in source),
        overlap_parameters=engine,
        overlap_tensor=engine,
        overlap_pipeline=engine,
        scatter_pipeline=old,
        graphs="graph" in source,
        gradient_bytes=2 if half else 4,
        accumulation_bytes=2 if dtype == "fp16" else 4,
        async_tensor=recent,
        fused_accumulation=recent,
        sharded_reduction=not nanotron,
        causal="llm-foundry" not in source,
        bucketed=elementwise != "eager",
        deepspeed=deepspeed,
        padded=old or engine or nanotron,
        balanced=nanotron,
        stops_early=elementwise in ("eager", "compiled"),
        fused_norms=elementwise != "eager" or nanotron,  # nanotron has a kernel for them
        norm_inputs="sailor" not in source,
    )
