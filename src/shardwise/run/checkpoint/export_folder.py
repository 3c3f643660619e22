"""Export of a run of a Hugging Face folder: the whole model for transformers, or its adapters alone for peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import RunFolderError
from shardwise.files import check_regular
from shardwise.run.checkpoint.export import newest_weights, reader_of
from shardwise.run.checkpoint.index import Stored
from shardwise.run.checkpoint.safetensors_file import write_tensors
from shardwise.run.training.run_folder import last_request, read_run
from shardwise.workload.recipes.huggingface import huggingface_workload
from shardwise.workload.recipes.pretrained.architecture import CONFIG, Architecture, architecture_of
from shardwise.workload.recipes.pretrained.lora import ADAPTER, DOWN, UP, Lora, heads_of, lora_of, plain_name
from shardwise.workload.settings import convert_settings, parameters_of
from shardwise.workload.weight_files import SINGLE, without_parameters

_BESIDE = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files beside the weights that a folder needs to be used; they are copied."""

_Read = Callable[[str], Tensor]


def export_folder(run: Path, out: Path, *, best: bool = False) -> None:
    """Write the trained model of a run as a folder that transformers loads; adapters are merged into its weights.

    Raises:
        RunFolderError: the run is not of a Hugging Face folder or has no checkpoint, or `out` exists already.
        CheckpointError: all checkpoints of the run are damaged or not finite.
        WorkloadError: the run's Hugging Face folder cannot be read any more.
    """
    architecture, lora = _trained(run)
    checkpoint, stored = newest_weights(run, best=best)
    read = reader_of(checkpoint, stored)
    kept = {plain_name(name): name for name in stored if DOWN not in name and UP not in name}
    merged = _merging(architecture, lora, stored, read) if lora.rank else read

    def write(folder: Path) -> None:
        specs = {plain: stored[name].spec for plain, name in kept.items()}
        write_tensors(folder / SINGLE, specs, lambda plain: merged(kept[plain]), {"format": "pt"})
        config = json.loads((architecture.folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "architectures": [architecture.name]}, indent=2) + "\n")
        for name in _BESIDE:
            if (architecture.folder / name).exists():
                check_regular(architecture.folder / name, RunFolderError)
                shutil.copyfile(architecture.folder / name, folder / name)

    _whole(out, write)


def export_adapter(run: Path, out: Path, *, best: bool = False) -> None:
    """Write the adapters of a run, and the trained head of a classifier, as a folder that peft loads.

    Raises:
        RunFolderError: the run has no adapters, and as in `export_folder`.
        CheckpointError: all checkpoints of the run are damaged or not finite.
        WorkloadError: the run's Hugging Face folder cannot be read any more.
    """
    architecture, lora = _trained(run)
    if not lora.rank:
        raise RunFolderError(f"run folder {run} holds no adapters: train with lora=RANK, or export it as a folder")
    checkpoint, stored = newest_weights(run, best=best)
    read = reader_of(checkpoint, stored)
    model, config = _empty(architecture, lora)
    heads = heads_of(model, architecture)
    config.modules_to_save = heads or None
    config.base_model_name_or_path, config.inference_mode = str(architecture.folder), True
    starts = tuple(f"{head}." for head in heads)
    kept = {_peft_name(name): name for name in stored if DOWN in name or UP in name or name.startswith(starts)}

    def write(folder: Path) -> None:
        specs = {name: stored[own].spec for name, own in kept.items()}
        write_tensors(folder / "adapter_model.safetensors", specs, lambda name: read(kept[name]), {"format": "pt"})
        config.save_pretrained(folder)

    _whole(out, write)


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def _trained(run: Path) -> tuple[Architecture, Lora]:
    """Return the architecture and the adapters of a run. Raises RunFolderError if it is not of a folder."""
    request = last_request(read_run(run))
    source = request["source"]
    if source is None or not Path(source, CONFIG).is_file():
        named = f"workload {request['workload']!r}" if source is None else repr(source)
        raise RunFolderError(
            f"run folder {run} is of {named}, which is no Hugging Face folder here: export its weights as a file"
        )
    parameters = parameters_of(huggingface_workload(Path(source)))
    values = convert_settings(f"workload {source!r}", parameters, request["settings"])
    return architecture_of(Path(source)), lora_of(values)


def _empty(architecture: Architecture, lora: Lora) -> tuple[nn.Module, Any]:
    """Return the model with adapters, without values, and peft's configuration of them."""
    with without_parameters():
        return lora.adapted(architecture.build(), architecture)


def _merging(architecture: Architecture, lora: Lora, stored: dict[str, Stored], read: _Read) -> _Read:
    """Return a reader that adds the product of the adapters to the weights that have some."""
    model, _ = _empty(architecture, lora)

    def merged(name: str) -> Tensor:
        weight, (path, _, last) = read(name), name.rpartition(".base_layer.")
        down, up = f"{path}{DOWN}{ADAPTER}.weight", f"{path}{UP}{ADAPTER}.weight"
        if last != "weight" or down not in stored:
            return weight
        change = read(up).float() @ read(down).float() * lora.scaling
        transposed = bool(getattr(model.get_submodule(path), "fan_in_fan_out", False))
        return torch.add(weight.float(), change.T if transposed else change).to(weight.dtype)

    return merged


def _whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write a new folder as a whole: it gets its name when it is complete. Raises RunFolderError."""
    if out.exists():
        raise RunFolderError(f"{out} is there already: remove it, or give another name")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write(partial)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written: {error.strerror}; give a folder elsewhere") from error
