"""Configuration of torchtitan (torchtitan/config/job_config.py) for a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.planner.launching.launch import ChosenStrategy, Launch
from shardwise.predict.runtime.sizes import Sizes
from shardwise.predict.workers.cuts import block_starts

SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B"}
"""Names of pipeline schedules, as torch.distributed.pipelining spells them."""

FLAVORS = {
    (32, 4096, 32, 8, 14336, 128256): "8B",
    (80, 8192, 64, 8, 28672, 128256): "70B",
    (126, 16384, 128, 8, 53248, 128256): "405B",
}
"""Layers, hidden, heads, heads of keys and values, ffn and vocabulary of the sizes that torchtitan's llama3 has."""

NOTES = (
    "the file is for torchtitan with torchtitan/config/job_config.py; data, tokenizer, optimizer, learning rate and "
    "checkpoints are yours to add",
)


def launch(chosen: ChosenStrategy) -> Launch:
    """Return the command and the files of a strategy."""
    assert chosen.transformer is not None
    sizes = chosen.transformer.sizes
    flavor = FLAVORS.get((sizes.layers, sizes.hidden, sizes.heads, sizes.kv_heads, sizes.ffn, sizes.vocab), "planned")
    tables = {
        "model": {"name": "llama3", "flavor": flavor},
        "training": _training(chosen),
        "parallelism": _parallelism(chosen),
        "activation_checkpoint": {"mode": str(chosen.strategy.recompute)},
    }
    files, notes = {"torchtitan.toml": _toml(tables)}, [*NOTES, *chosen.host_notes]
    if flavor == "planned":
        files["flavor.py"] = f'"{flavor}": TransformerModelArgs({_arguments(sizes)}),\n'
        notes.append("flavor.py belongs in torchtitan/models/llama3/__init__.py, which has no flavor of these sizes")
    words = (*chosen.torchrun(), "-m", "torchtitan.train", "--job.config_file", "torchtitan.toml")
    return Launch(arguments=words, files=files, notes=tuple(notes))


def _training(chosen: ChosenStrategy) -> dict[str, Any]:
    """Return the table of the batch and its precision; without a pipeline, microbatches accumulate gradients."""
    assert chosen.transformer is not None
    strategy, size = chosen.strategy, chosen.workload.batch_size
    found: dict[str, Any] = {
        "local_batch_size": size // strategy.replicas if strategy.pp > 1 else chosen.samples,
        "global_batch_size": size,
        "seq_len": chosen.transformer.sizes.sequence,
        "mixed_precision_param": "bfloat16" if chosen.in_bf16 else "float32",
        "compile": True,
    }
    if chosen.workload.clip_norm is not None:
        found["max_norm"] = float(chosen.workload.clip_norm)
    if strategy.offload:
        found["enable_cpu_offload"] = True
    return found


def _parallelism(chosen: ChosenStrategy) -> dict[str, Any]:
    strategy = chosen.strategy
    found: dict[str, Any] = {
        "data_parallel_replicate_degree": strategy.dp,
        "data_parallel_shard_degree": strategy.fsdp,
        "tensor_parallel_degree": strategy.tp,
        "pipeline_parallel_degree": strategy.pp,
    }
    if strategy.fsdp > 1:
        always = "always" if strategy.pp > 1 else "default"  # by default a pipeline never reshards
        found["fsdp_reshard_after_forward"] = always if strategy.zero == 3 else "never"
    if strategy.pp > 1:
        starts = block_starts(chosen.profile, strategy.pp * strategy.stages_per_worker)
        found["pipeline_parallel_schedule"] = SCHEDULES[strategy.schedule]
        found["pipeline_parallel_microbatch_size"] = chosen.samples
        found["pipeline_parallel_split_points"] = [f"layers.{start - 1}" for start in starts[1:]]
    return found


def _arguments(sizes: Sizes) -> str:
    """Return the arguments of TransformerModelArgs, which computes the width of the MLP from two of them."""
    multiple = min(256, sizes.ffn & -sizes.ffn)
    values = {
        "dim": sizes.hidden,
        "n_layers": sizes.layers,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab,
        "multiple_of": multiple,
        "ffn_dim_multiplier": (sizes.ffn - (multiple - 1) / 2 + 0.5) / (8 * sizes.hidden // 3),
    }
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items()), ""])
        for name, table in tables.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
