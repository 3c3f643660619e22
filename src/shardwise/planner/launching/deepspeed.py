"""Configuration of DeepSpeed (docs/_pages/config-json.md) for a strategy."""

from __future__ import annotations

import json
from typing import Any

from shardwise.planner.launching.launch import ChosenStrategy, Launch

NOTES = (
    "train.py is your program, with deepspeed.initialize around your module; optimizer and learning rate are its own "
    "or yours to add",
)

GATHERED = (
    "stage 2 is priced as if parameters were gathered during the next forward pass; DeepSpeed gathers them at the "
    "end of the step"
)

CHECKPOINTED = (
    "recompute=full is not among the settings: call model.gradient_checkpointing_enable(), or "
    "torch.utils.checkpoint.checkpoint with use_reentrant=False for each block"
)
"""Note about recomputation for software whose configuration does not reach into the module."""


def launch(chosen: ChosenStrategy) -> Launch:
    """Return the command and the file of a strategy."""
    strategy, workload = chosen.strategy, chosen.workload
    settings: dict[str, Any] = {
        "train_batch_size": workload.batch_size,
        "train_micro_batch_size_per_gpu": chosen.samples,
        "gradient_accumulation_steps": strategy.microbatches,
        "zero_optimization": _zero(chosen),
    }
    if chosen.in_bf16:
        settings["bf16"] = {"enabled": True}
    if workload.clip_norm is not None:
        settings["gradient_clipping"] = float(workload.clip_norm)
    hosts, each = chosen.hosts
    words = ("deepspeed", "--num_nodes", str(hosts), "--num_gpus", str(each), "train.py")
    notes = [*NOTES, *([GATHERED] if strategy.fsdp > 1 and strategy.zero == 2 else [])]
    notes += [CHECKPOINTED] if strategy.recomputes else []
    return Launch(
        arguments=(*words, "--deepspeed_config", "ds_config.json"),
        files={"ds_config.json": json.dumps(settings, indent=2) + "\n"},
        notes=tuple(notes),
    )


def _zero(chosen: ChosenStrategy) -> dict[str, Any]:
    strategy = chosen.strategy
    if strategy.fsdp == 1:
        return {"stage": 0}
    found: dict[str, Any] = {"stage": strategy.zero, "overlap_comm": True}
    if strategy.offload:
        found["offload_optimizer"] = {"device": "cpu"}
        if strategy.zero == 3:
            found["offload_param"] = {"device": "cpu"}
    return found
