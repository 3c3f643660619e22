"""A folder with a Hugging Face `config.json` as a workload: its own architecture, from its weights if it has them.

The architecture that the configuration names decides the training task:

    causal language model     predict the next token
    encoder and decoder       predict the tokens that follow a text
    masked language model     predict the 15% of the tokens that are hidden, others in each epoch
    text classification       classify the labelled text in `data`
    image classification      classify scikit-learn's digits

Text is Python's standard library, or the user's `data`; in tokens of the folder's `tokenizer.json`, else byte by byte.
Weights in safetensors files are not read as a whole: each worker reads the part that it holds.

The parameters, for --set:
    batch_size: samples per step over all workers.
    sequence: tokens per sample.
    precision: float32, bf16 or autocast; None means bf16 if the configuration's dtype is bfloat16, else float32.
    data: text or token ids as in the recipe `language`, None means the standard library's source; for text
        classification labelled text: a .csv, .tsv or .jsonl file, or a folder with train.csv and validation.csv.
    weights: `folder` starts from the folder's weights if it has some; `random` does not.
    learning_rate: largest learning rate; None means 5e-5 with stored weights, 2e-4 with adapters, else 3e-4.
    warmup_steps: steps over which the learning rate rises; None means 100, or 6% of an epoch if that is less, with
        stored weights, else 0.
    schedule_steps: steps after which the learning rate has fallen to 2% along a cosine; None means that it stays.
    weight_decay: AdamW's weight decay of matrices and kernels; None means 0.01 with stored weights, else 0.1.
    clip_norm: largest norm of the gradient; None means no clipping.
    evaluation_samples: largest number of held-out samples that are scored; 0 means none.
    lora: rank of low-rank adapters, which alone are trained (with the head of a classifier); 0 means none.
    lora_alpha: numerator of the adapters' factor alpha / rank; None means twice the rank.
    lora_dropout: share of an adapter's inputs that are dropped in training.
    lora_targets: names of the layers that get adapters, separated by commas, or `all-linear`; None means peft's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.checks import MOST, check_at_most, check_positive, check_share
from shardwise.workload.recipes.pretrained.architecture import Architecture, architecture_of
from shardwise.workload.recipes.pretrained.lora import Lora, with_lora
from shardwise.workload.recipes.pretrained.stored import origin_of
from shardwise.workload.recipes.pretrained.tasks import task_of
from shardwise.workload.recipes.training import adamw, warmup_constant, warmup_cosine
from shardwise.workload.workload import Workload

MOST_WARMUP_STEPS, WARMUP_SHARE = 100, 0.06
"""Steps of the warm-up of a fine-tuning, and their largest share of an epoch."""


def huggingface_workload(folder: Path) -> Callable[..., Workload]:
    """Return the workload function of a folder."""

    def workload(
        batch_size: int = 8,
        sequence: int = 128,
        precision: Literal["float32", "bf16", "autocast"] | None = None,
        data: str | None = None,
        weights: Literal["folder", "random"] = "folder",
        learning_rate: float | None = None,
        warmup_steps: int | None = None,
        schedule_steps: int | None = None,
        weight_decay: float | None = None,
        clip_norm: float | None = 1.0,
        evaluation_samples: int = 256,
        lora: int = 0,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_targets: str | None = None,
    ) -> Workload:
        check_share(lora_dropout=lora_dropout)
        given = {"learning_rate": learning_rate, "schedule_steps": schedule_steps, "lora_alpha": lora_alpha}
        check_positive(batch_size=batch_size, sequence=sequence, **_given(given))
        _check_not_negative(warmup_steps=warmup_steps, evaluation_samples=evaluation_samples)
        _check_not_negative(weight_decay=weight_decay, lora=lora)
        architecture = architecture_of(folder)
        architecture.check_sequence(sequence)
        task = task_of(architecture, sequence, data, evaluation_samples)
        adapters = Lora(lora, lora_alpha, lora_dropout, lora_targets)
        origin = with_lora(origin_of(architecture, random=weights == "random"), architecture, adapters)
        rate, decay = (5e-5, 0.01) if origin.stored else (3e-4, 0.1)
        rate = 2e-4 if lora else rate
        warmup = _warmup(len(task.dataset), batch_size) if origin.stored else 0
        return Workload(
            name=folder.resolve().name,
            model=origin.factory,
            dataset=task.dataset,
            inputs=task.inputs,
            loss=task.loss,
            optimizer=adamw(_default(learning_rate, rate), _default(weight_decay, decay)),
            batch_size=batch_size,
            weight=task.weight,
            schedule=_schedule(_default(warmup_steps, warmup), schedule_steps),
            evaluation=task.evaluation,
            precision=precision or ("bf16" if architecture.in_bf16 else "float32"),
            clip_norm=clip_norm,
            libraries=("transformers",),
            notes=(*origin.notes, *task.notes, *_precision_notes(architecture, precision)),
        )

    return workload


def _precision_notes(architecture: Architecture, precision: str | None) -> tuple[str, ...]:
    """Say that the configuration names a dtype in which nothing trains here, unless the user chose another one."""
    named = architecture.dtype
    if precision is not None or named in ("", "float32", "bfloat16"):
        return ()
    return (
        f"precision: float32, because nothing trains in {named}, which the configuration names; --set precision=bf16",
    )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_not_negative(**values: float | None) -> None:
    """Raise WorkloadError if a value that is given is below 0, or far too large."""
    for name, value in _given(values).items():
        if not value >= 0:
            raise WorkloadError(f"{name}={value}: must be 0 or more")
        check_at_most(MOST, **{name: value})


def _warmup(samples: int, batch_size: int) -> int:
    return min(MOST_WARMUP_STEPS, math.ceil(WARMUP_SHARE * samples / batch_size))


def _schedule(warmup: int, steps: int | None) -> Any:
    """Return the schedule of the learning rate. Returns None if it is constant."""
    if steps is not None:
        if warmup >= steps:
            raise WorkloadError(f"schedule_steps={steps}: must be above warmup_steps={warmup}")
        return warmup_cosine(steps, warmup / steps)
    return warmup_constant(warmup) if warmup else None
