"""Arguments of Megatron-LM's pretrain_gpt.py (megatron/training/arguments.py) for a strategy."""

from __future__ import annotations

from collections.abc import Iterator

from shardwise.planner.launching.launch import ChosenStrategy, Launch
from shardwise.predict.runtime.transformer import Transformer

NOTES = (
    "pretrain_gpt.py is Megatron-LM's; data, tokenizer, learning rate, checkpoints and the model's constants (rotary "
    "base, epsilon of norms, initialization) are yours to add",
    "--tp-comm-overlap and --attention-backend fused need Transformer Engine",
)


def launch(chosen: ChosenStrategy) -> Launch:
    """Return the command of a strategy."""
    assert chosen.transformer is not None
    words = (
        *_sizes(chosen.transformer),
        *_batch(chosen),
        *_degrees(chosen),
        *_recompute(chosen),
        *_kernels(chosen),
    )
    blocking = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if chosen.strategy.tp > 1 else {}
    return Launch(
        arguments=(*chosen.torchrun(), "pretrain_gpt.py", *words),
        environment=blocking,
        notes=(*NOTES, *chosen.host_notes),
    )


def _sizes(transformer: Transformer) -> Iterator[str]:
    sizes, family = transformer.sizes, transformer.family
    numbers = {
        "--num-layers": sizes.layers,
        "--hidden-size": sizes.hidden,
        "--ffn-hidden-size": sizes.ffn,
        "--num-attention-heads": sizes.heads,
        "--seq-length": sizes.sequence,
        "--max-position-embeddings": sizes.sequence,
        "--vocab-size": sizes.vocab,
        "--hidden-dropout": transformer.dropout,
        "--attention-dropout": transformer.dropout,
    }
    for name, value in numbers.items():
        yield from (name, f"{value:g}" if isinstance(value, float) else str(value))
    if sizes.kv_heads != sizes.heads:
        yield from ("--group-query-attention", "--num-query-groups", str(sizes.kv_heads))
    yield from ("--position-embedding-type", "learned_absolute" if sizes.learned_positions else "rope")
    yield from ("--normalization", "LayerNorm" if sizes.biases else "RMSNorm")
    if sizes.gated:
        yield "--swiglu"
    if not sizes.biases:
        yield "--disable-bias-linear"
    if family == "qwen2":
        yield "--add-qkv-bias"
    if not sizes.tied:
        yield "--untie-embeddings-and-output-weights"


def _batch(chosen: ChosenStrategy) -> Iterator[str]:
    yield from ("--micro-batch-size", str(chosen.samples), "--global-batch-size", str(chosen.workload.batch_size))
    yield from ("--clip-grad", f"{chosen.workload.clip_norm or 0:g}")
    if chosen.in_bf16:
        yield "--bf16"


def _degrees(chosen: ChosenStrategy) -> Iterator[str]:
    strategy = chosen.strategy
    yield from ("--tensor-model-parallel-size", str(strategy.tp), "--pipeline-model-parallel-size", str(strategy.pp))
    if strategy.sp:
        yield from ("--sequence-parallel", "--tp-comm-overlap")
    if _counts_ends(chosen):
        yield from ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
    if strategy.stages_per_worker > 1:
        yield from ("--num-virtual-stages-per-pipeline-rank", str(strategy.stages_per_worker))
    if strategy.pp > 1 and strategy.replicas > 1 and strategy.outermost == "dp":
        yield "--use-tp-pp-dp-mapping"
    if strategy.replicas > 1:
        yield "--overlap-grad-reduce"
    if strategy.fsdp > 1:
        yield from ("--use-distributed-optimizer", "--overlap-param-gather")


def _counts_ends(chosen: ChosenStrategy) -> bool:
    """Return whether embedding and output count as blocks, because the blocks alone do not divide by the stages."""
    assert chosen.transformer is not None
    return chosen.transformer.sizes.layers % (chosen.strategy.pp * chosen.strategy.stages_per_worker) > 0


def _recompute(chosen: ChosenStrategy) -> Iterator[str]:
    """Yield the arguments of recomputation: of every block by itself, or of the first blocks of each stage."""
    strategy = chosen.strategy
    if not strategy.recomputes:
        return
    assert chosen.transformer is not None
    yield from ("--recompute-granularity", "full")
    if strategy.recompute.partial:
        stages = strategy.pp * strategy.stages_per_worker
        blocks = -(-chosen.transformer.sizes.layers // stages)  # of a stage in the middle
        yield from ("--recompute-method", "block", "--recompute-num-layers", str(strategy.recomputed_of(blocks)))
    else:
        yield from ("--recompute-method", "uniform", "--recompute-num-layers", "1")


def _kernels(chosen: ChosenStrategy) -> Iterator[str]:
    """Yield the arguments of the kernels that the prediction assumes."""
    yield from ("--attention-backend", chosen.profile.runtime.attention)
    yield from ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te")
