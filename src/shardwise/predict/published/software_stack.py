"""Software of a row's run, inferred from its source, precision and notes."""

from __future__ import annotations

from dataclasses import replace

from shardwise.predict.published import cells
from shardwise.predict.published.columns import Row, text
from shardwise.predict.runtime import known
from shardwise.predict.runtime.runtime import Runtime

DEEPSPEED = ("deepspeed", "bigscience", "bloom", "vtrain", "sailor")
"""Words that mark sources which ran Megatron-DeepSpeed."""

ENGINE = ("nemo", "megatron-bridge", "transformer engine", "transformerengine")
"""Words that mark sources which ran NVIDIA's Transformer Engine."""


def runtime_of(row: Row, dtype: str) -> Runtime:
    """Infer the software of a row's run, as far as it matters for time and memory."""
    words = _words(row)
    pure = "pure" in text(row, "precision").lower()
    found = known.in_precision(_software(row, words, dtype), dtype, pure=pure)
    zero = cells.zero(text(row, "zero_fsdp"))
    after_passes = "nanotron" in words and zero > 0  # it then reduces gradients only after the last pass
    overlapped = "overlapped)" in words and "not overlapped" not in words
    half = dtype in ("fp16", "bf16") and "gpt" in text(row, "model").lower()
    return replace(
        found,
        dropout=dtype == "fp16" or (half and found.padded and "nanotron" not in words),
        overlap_gradients=(found.overlap_gradients and not after_passes) or overlapped,
        graphs="graph" in words,
        sharded_gradients=zero == 2,
        norm_inputs="sailor" not in words,
    )


def _words(row: Row) -> str:
    return f"{text(row, 'source')} {text(row, 'group')} {row.get('compile')} {row.get('notes')}".lower()


def _software(row: Row, words: str, dtype: str) -> Runtime:
    if any(word in words for word in DEEPSPEED):
        return known.MEGATRON_DEEPSPEED
    engine = any(word in words for word in ENGINE) or "TE" in text(row, "compile")
    if dtype in ("fp16", "tf32", "float32"):
        return known.MEGATRON_2022 if engine or "korthikanti" in words else known.MEGATRON_2021
    if engine:
        return known.NEMO_AMPERE if "a100" in text(row, "gpu").lower() else known.MEGATRON_CORE
    if "nanotron" in words:
        return known.NANOTRON
    if text(row, "compile").lower().startswith(("yes", "true", "torch.compile", "on", "1")):
        return known.TORCHTITAN
    return known.LLM_FOUNDRY if "llm-foundry" in words else known.FSDP
