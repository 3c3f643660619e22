"""Configuration of accelerate (accelerate/commands/config/config_args.py) for a strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardwise.planner.launching.deepspeed import CHECKPOINTED
from shardwise.planner.launching.launch import ChosenStrategy, Launch

FILE = "accelerate.yaml"

NOTES = ("train.py is your program, with Accelerator.prepare around your module",)


def launch(chosen: ChosenStrategy) -> Launch:
    """Return the command and the file of a strategy."""
    strategy = chosen.strategy
    hosts, _ = chosen.hosts
    kind = "FSDP" if strategy.fsdp > 1 else "MULTI_GPU" if strategy.dp > 1 else "NO"
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "mixed_precision": "bf16" if chosen.in_bf16 else "no",
        "num_machines": hosts,
        "num_processes": strategy.workers,
    }
    if strategy.fsdp > 1:
        settings["fsdp_config"] = _fsdp(chosen)
    if strategy.fsdp > 1 and strategy.dp > 1:
        settings["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": strategy.dp,
            "parallelism_config_dp_shard_size": strategy.fsdp,
        }
    return Launch(
        arguments=("accelerate", "launch", "--config_file", FILE, "train.py"),
        files={FILE: "".join(f"{line}\n" for line in _yaml(settings))},
        notes=tuple(_notes(chosen)),
    )


def _fsdp(chosen: ChosenStrategy) -> dict[str, Any]:
    strategy = chosen.strategy
    found: dict[str, Any] = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": strategy.zero == 3,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_activation_checkpointing": strategy.recomputes,
        "fsdp_offload_params": bool(strategy.offload),
    }
    if chosen.layer_class:
        found["fsdp_transformer_layer_cls_to_wrap"] = chosen.layer_class
    return found


def _notes(chosen: ChosenStrategy) -> Iterator[str]:
    strategy, count = chosen.strategy, chosen.strategy.microbatches
    yield from NOTES
    yield f"the batch of your DataLoader is {chosen.samples} for each process"
    if count > 1 and strategy.fsdp > 1:
        yield (
            f"microbatches={count}: give Accelerator gradient_accumulation_plugin="
            f"GradientAccumulationPlugin(num_steps={count}, sync_each_batch=True), so that gradients "
            "stay sharded"
        )
    elif count > 1:
        yield f"microbatches={count}: give Accelerator gradient_accumulation_steps={count}"
    if strategy.recomputes and strategy.fsdp == 1:
        yield CHECKPOINTED
    if strategy.fsdp > 1 and not chosen.layer_class:
        yield "fsdp_transformer_layer_cls_to_wrap is missing: name the class of your model's blocks"
    yield from chosen.host_notes


def _yaml(settings: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """Return a YAML scalar; the words `no` and `NO` are texts only in quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if str(value).lower() in ("no", "yes") else str(value)
