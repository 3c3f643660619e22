"""Sizes of a workload's transformer, and workloads that software has no model of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import WorkloadError
from shardwise.predict.runtime.sizes import Sizes
from shardwise.predict.runtime.software import ABILITIES
from shardwise.predict.runtime.transformer import transformer_of
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": 300,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
}


def folder(path: Path, config: dict[str, Any]) -> Workload:
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_workload(str(path), {"sequence": 32})


def test_the_recipe() -> None:
    spec = "gpt:layers=6,hidden=64,heads=4,kv_heads=2,ffn=160,vocabulary=300,sequence=32,tied=true"
    found = transformer_of(load_workload(spec), ABILITIES["megatron"])
    expected = Sizes(layers=6, hidden=64, heads=4, kv_heads=2, ffn=160, vocab=300, sequence=32, gated=True, tied=True)
    assert (found.family, found.sizes, found.dropout) == ("llama", expected, 0.0)


def test_dropout_is_read() -> None:
    workload = load_workload("language", {"dropout": "0.2"})
    assert transformer_of(workload, ABILITIES["megatron"]).dropout == pytest.approx(0.2)
    with pytest.raises(WorkloadError, match="it has dropout, torchtitan has none"):
        transformer_of(workload, ABILITIES["torchtitan"])


@pytest.mark.parametrize(
    ("config", "ffn", "layers", "kv_heads", "plain"),
    [(LLAMA, 160, 6, 2, False), (QWEN2, 160, 6, 2, False), (GPT2, 256, 3, 4, True)],
    ids=["llama", "qwen2", "gpt2"],
)
def test_a_folder(config: dict[str, Any], ffn: int, layers: int, kv_heads: int, *, plain: bool, tmp_path: Path) -> None:
    found = transformer_of(folder(tmp_path, config), ABILITIES["megatron"])
    sizes = found.sizes
    assert found.family == config["model_type"]
    assert (sizes.layers, sizes.hidden, sizes.heads, sizes.kv_heads, sizes.ffn) == (layers, 64, 4, kv_heads, ffn)
    assert (sizes.vocab, sizes.sequence, sizes.tied) == (300, 32, config is not LLAMA)
    assert (sizes.gated, sizes.learned_positions, sizes.biases) == (not plain, plain, plain)


@pytest.mark.parametrize(
    ("config", "runtime", "told"),
    [
        (MIXTRAL, "megatron", "a mixtral model is none of llama, mistral, qwen2, gpt2"),
        (GPT2, "torchtitan", "a gpt2 model is none of llama, mistral"),
        ({**LLAMA, "tie_word_embeddings": True}, "torchtitan", "embedding and output share their matrix"),
        ({**LLAMA, "head_dim": 32}, "megatron", "parameters, a llama model of its sizes"),
    ],
    ids=["experts", "family", "tied", "wide heads"],
)
def test_models_that_software_does_not_have(config: dict[str, Any], runtime: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=told) as refused:
        transformer_of(folder(tmp_path, config), ABILITIES[runtime])
    assert "--runtime accelerate" in str(refused.value)


def test_other_workloads() -> None:
    with pytest.raises(
        WorkloadError, match=r"Megatron-LM trains transformers of its own, and 'image-vit' is none of them"
    ):
        transformer_of(load_workload("image"), ABILITIES["megatron"])


def test_adapters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    workload = load_workload(str(tmp_path), {"sequence": "32", "lora": "2"})
    with pytest.raises(WorkloadError, match="use --runtime accelerate"):
        transformer_of(workload, ABILITIES["megatron"])
