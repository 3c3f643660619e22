"""Adapters on a Hugging Face folder train as in one process, and are exported alone or merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pools
from safetensors.torch import load_file
from tiny import SIZES
from traces import remembered

from shardwise import Strategy, export, train
from shardwise.errors import RequestError, WorkloadError
from shardwise.run.verification import verify
from shardwise.workload.load import load_workload
from shardwise.workload.source import Source

PRELOAD = ("transformers.models.llama.modeling_llama", "peft")
SETTINGS = {"sequence": "16", "lora": "4"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: llama, classifier (BERT); reviews.csv."""
    import transformers

    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("lora")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(
        root / "llama"
    )
    labels: dict[str, Any] = {"num_labels": 3}
    bert = transformers.BertConfig(**SIZES, **labels)
    transformers.BertForSequenceClassification(bert).save_pretrained(root / "classifier")
    (root / "reviews.csv").write_text("\n".join(["text,label", *(f"film {n * n},{n % 3}" for n in range(40))]))
    return root


def settings(folders: Path, model: str) -> dict[str, str]:
    return SETTINGS if model == "llama" else {**SETTINGS, "data": str(folders / "reviews.csv")}


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
@pytest.mark.parametrize("model", ["llama", "classifier"])
def test_trains_as_in_one_process(model: str, strategy: str, folders: Path, workers: Pools, tmp_path: Path) -> None:
    chosen = Strategy.parse(strategy).for_batch(8)
    source = Source(workload=str(folders / model), settings=settings(folders, model))

    def trial(strategy: Strategy) -> verify.StrategyTrial:
        return verify.StrategyTrial(source=source, strategy=strategy, steps=2, float64=True, folder=str(tmp_path))

    workers(1, verify.record, trial(Strategy(microbatches=chosen.microbatches)))
    proof = workers(2, compare, trial(chosen))[0]
    assert proof.passed, proof


def compare(trial: verify.StrategyTrial) -> verify.Proof | None:
    with remembered((trial.source, trial.float64)):
        return verify.compare(trial)


def test_only_adapters_and_a_new_head_are_trained(folders: Path) -> None:
    for model, others in (("llama", set()), ("classifier", {"classifier.weight", "classifier.bias"})):
        workload = load_workload(str(folders / model), settings(folders, model))
        trained = {name for name, p in workload.model().named_parameters() if p.requires_grad}
        adapters = {name for name in trained if "lora_A" in name or "lora_B" in name}
        assert len(adapters) == 8
        assert trained - adapters == others
        assert workload.notes[1].startswith("lora: adapters of rank 4")


def test_layers_that_are_not_there_are_refused(folders: Path) -> None:
    with pytest.raises(WorkloadError, match=r"lora=4: LlamaForCausalLM cannot get adapters.*lora_targets"):
        load_workload(str(folders / "llama"), {**SETTINGS, "lora_targets": "nothing"})


@pytest.fixture(scope="module")
def runs(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three steps: llama, classifier (both with adapters), whole (llama without them)."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDWISE_CLUSTER", "off")
        for name in ("llama", "classifier", "whole"):
            model = "llama" if name == "whole" else name
            chosen = {**settings(folders, model), "learning_rate": "0.01", **({"lora": "0"} if name == "whole" else {})}
            train(str(folders / model), settings=chosen, steps=3, out=root / name, quiet=True)
    return root


def peft_model(base: Path, adapter: Path) -> torch.nn.Module:
    import peft
    import transformers

    name = "LlamaForCausalLM" if base.name == "llama" else "BertForSequenceClassification"
    model: torch.nn.Module = getattr(transformers, name).from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).train(False)


@pytest.mark.parametrize("name", ["llama", "classifier"])
def test_adapters_alone_and_merged_are_the_same_model(name: str, folders: Path, runs: Path, tmp_path: Path) -> None:
    import transformers

    export(runs / name, tmp_path / "adapter", "adapter")
    export(runs / name, tmp_path / "merged", "folder")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    alone = peft_model(folders / name, tmp_path / "adapter")
    kind = "AutoModelForCausalLM" if name == "llama" else "AutoModelForSequenceClassification"
    merged = getattr(transformers, kind).from_pretrained(tmp_path / "merged").train(False)
    base = getattr(transformers, kind).from_pretrained(folders / name).train(False)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (alone, merged, base)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert float((logits[1] - logits[2]).abs().max()) > 1e-4  # it was trained
    own = load_workload(str(tmp_path / "merged"), {**settings(folders, name), "lora": "0"})
    assert not any("random" in note or "neither trained" in note for note in own.notes)


def test_a_whole_model_is_exported_into_a_folder(folders: Path, runs: Path, tmp_path: Path) -> None:
    import transformers

    export(runs / "whole", tmp_path / "folder", "folder")
    export(runs / "whole", tmp_path / "plain.safetensors")
    loaded: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folder", output_loading_info=True)
    model, found = loaded
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    for key, tensor in load_file(tmp_path / "plain.safetensors").items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_merging_knows_transposed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 stores its square and its wide matrices as (inputs, outputs)."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    chosen = {**SETTINGS, "lora_targets": "c_attn,c_proj", "learning_rate": "0.05"}
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")
    train(str(tmp_path / "gpt2"), settings=chosen, steps=2, out=tmp_path / "run", quiet=True)
    for form in ("adapter", "folder"):
        export(tmp_path / "run", tmp_path / form, form)
    import peft

    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    alone = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").train(False)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").train(False)
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(alone(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "form", "match"),
    [
        ("whole", "adapter", "holds no adapters"),
        ("whole", "foldr", "form=foldr: known are file, folder, adapter"),
        ("none", "folder", "none"),
    ],
)
def test_what_cannot_be_exported_is_one_line(name: str, form: str, match: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=match) as raised:
        export(runs / name, tmp_path / "out", form)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
