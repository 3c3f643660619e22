"""Read a workload's transformer as other software would train it, from the sizes of its module alone.

Software with models of its own cannot run the user's module. It trains a transformer of the same sizes, if it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardwise.errors import WorkloadError
from shardwise.predict.profile.meta_model import batch, builds
from shardwise.predict.profile.optimizer import update_of
from shardwise.predict.runtime.profile import MOMENTS
from shardwise.predict.runtime.sizes import Sizes
from shardwise.predict.runtime.software import Abilities
from shardwise.workload.recipes.models.gpt import GPT
from shardwise.workload.workload import Workload

NEAR = 0.01
"""Relative difference of the number of parameters up to which a model counts as the transformer of its sizes."""

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
"""Fields of configurations that give the width of the MLP."""


@dataclass(frozen=True, slots=True)
class Transformer:
    """A transformer that other software has a model of.

    Attributes:
        family: kind of block, by the model type of Hugging Face: llama, mistral, qwen2 or gpt2.
        sizes: its sizes.
        dropout: largest probability of its dropout layers.
    """

    family: str
    sizes: Sizes
    dropout: float = 0.0


def transformer_of(workload: Workload, abilities: Abilities) -> Transformer:
    """Return the transformer that software would train in place of a workload's module.

    Raises:
        WorkloadError: the software has no such model, or the workload trains it in a way that is not known here.
    """
    module = next(builds(workload)).module
    found = _of_recipe(module, workload) if isinstance(module, GPT) else _of_configuration(module, workload)
    refusal = _unlike(workload, module, found, abilities)
    if refusal:
        raise WorkloadError(
            f"{abilities.title} trains transformers of its own, and {workload.name!r} is none of them: {refusal}; "
            "use --runtime accelerate or --runtime deepspeed, which run any module"
        )
    assert found is not None
    return found


def _unlike(workload: Workload, module: nn.Module, found: Transformer | None, abilities: Abilities) -> str:
    """Return what software's own models lack of a workload; empty if nothing."""
    if found is None or found.family not in abilities.models:
        kind = type(module).__name__ if found is None else f"a {found.family} model"
        return f"{kind} is none of {', '.join(abilities.models)}"
    sizes, own = found.sizes, sum(parameter.numel() for parameter in module.parameters())
    if abs(own / sizes.parameters - 1) > NEAR:
        return f"it has {own:,} parameters, a {found.family} model of its sizes {sizes.parameters:,}"
    if not all(parameter.requires_grad for parameter in module.parameters()):
        return "only a part of its parameters is trained"
    if sizes.tied and not abilities.tied:
        return f"embedding and output share their matrix, {abilities.title} has two"
    if not abilities.plain and found.dropout:
        return f"it has dropout, {abilities.title} has none"
    if round(update_of(workload).state_bytes) != MOMENTS:
        return "it is not trained with Adam"
    return ""


def _of_recipe(module: GPT, workload: Workload) -> Transformer:
    block: Any = module.blocks[0]
    sizes = Sizes(
        layers=len(module.blocks),
        hidden=module.embedding.embedding_dim,
        heads=block.attention.heads,
        kv_heads=block.attention.kv_heads,
        ffn=block.mlp.gate.out_features,
        vocab=module.embedding.num_embeddings,
        sequence=_tokens(workload),
        gated=True,
        tied=module.head.weight is module.embedding.weight,
    )
    return Transformer("llama", sizes, _dropout(module))


def _of_configuration(module: nn.Module, workload: Workload) -> Transformer | None:
    """Read the sizes of a Hugging Face model from its configuration. Returns None for any other module."""
    config: Any = getattr(module, "config", None)
    family = getattr(config, "model_type", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(family, str) or not isinstance(layers, int) or getattr(config, "hidden_size", None) is None:
        return None
    plain, heads = family == "gpt2", config.num_attention_heads
    ffn = next((size for name in WIDTHS if (size := getattr(config, name, None))), 4 * config.hidden_size)
    sizes = Sizes(
        layers=layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        ffn=ffn,
        vocab=config.vocab_size,
        sequence=_tokens(workload),
        gated=not plain,
        tied=bool(config.tie_word_embeddings),
        learned_positions=plain,
        biases=plain,
    )
    return Transformer(family, sizes, _dropout(module))


def _dropout(module: nn.Module) -> float:
    return max((each.p for each in module.modules() if isinstance(each, nn.Dropout)), default=0.0)


def _tokens(workload: Workload) -> int:
    """Return the tokens of a sample: the length of the first tensor of whole numbers that the model is called with."""
    for leaf in tree_leaves(workload.inputs(batch(workload, 1))):
        if isinstance(leaf, torch.Tensor) and leaf.dim() == 2 and not leaf.dtype.is_floating_point:
            return int(leaf.shape[1])
    raise WorkloadError(f"workload {workload.name!r} has no tokens: its model is called with no row of whole numbers")
