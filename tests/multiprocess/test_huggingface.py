"""A folder with a Hugging Face config.json is a workload; its weights are read by each worker in part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pool import Pools
from safetensors.torch import load_file, save_file
from tiny import SIZES
from torch import Tensor
from traces import remembered

from shardwise import Strategy, Workload
from shardwise.errors import WorkloadError
from shardwise.run.verification import verify
from shardwise.workload.load import load_workload
from shardwise.workload.source import Source
from shardwise.workload.weight_files import INDEX, SINGLE, StoredModel, StoredWeights, without_parameters

PRELOAD = ("transformers.models.llama.modeling_llama",)
SETTINGS = {"sequence": "16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama (weights in several files), gemma (tied embeddings, one key head), gpt2, mixtral, plain (no weights)."""
    import transformers

    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("huggingface")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    llama.save_pretrained(root / "llama", max_shard_size="60KB")
    gemma = transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8)
    transformers.GemmaForCausalLM(gemma).save_pretrained(root / "gemma")
    gpt2 = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    mixtral = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    transformers.MixtralForCausalLM(mixtral).save_pretrained(root / "mixtral")
    llama.config.save_pretrained(root / "plain")
    return root


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def built(folder: str, strategy: str) -> tuple[dict[str, Tensor] | None, int]:
    """The full state dict, and how many elements this worker has read."""
    from shardwise.parallel.program import Program

    count, read = 0, StoredWeights.read

    def counted(self: StoredWeights, name: str, *box: Any) -> Tensor:
        nonlocal count
        part = read(self, name, *box)
        count += part.numel()
        return part

    with mock.patch.object(StoredWeights, "read", counted), remembered(folder):
        program = Program.build(load_workload(folder, SETTINGS), Strategy.parse(strategy))
    return program.full_state_dict(), count


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        *(("llama", strategy) for strategy in ("single", "dp=2", "tp=2", "fsdp=2,tp=2")),
        *(("gemma", strategy) for strategy in ("single", "fsdp=2", "pp=2", "tp=2,pp=2")),
    ],
)
def test_each_worker_reads_its_part(model: str, strategy: str, folders: Path, workers: Pools) -> None:
    count = Strategy.parse(strategy).workers
    results = workers(count, built, str(folders / model), strategy)
    full, expected = results[0][0], stored(folders / model)
    assert full is not None
    assert set(expected) <= set(full)
    for name, tensor in expected.items():
        assert torch.equal(full[name], tensor), name
    whole = sum(tensor.numel() for tensor in expected.values())
    split = count // Strategy.parse(strategy).dp
    for _, read in results:  # a stage may be larger than another, and a tied embedding is on two of them
        assert read <= whole * (1.0 if split == 1 else 1.35 / split if "pp" not in strategy else 2.2 / split)


@pytest.fixture(scope="module")
def recorded(
    folders: Path, workers: Pools, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Strategy], verify.StrategyTrial]:
    """The trial of a model under a strategy, with one worker's steps for it."""
    places: dict[Any, Path] = {}

    def get(model: str, strategy: Strategy) -> verify.StrategyTrial:
        source = Source(workload=str(folders / model), settings=SETTINGS)
        key = (model, strategy.microbatches)
        if key not in places:
            places[key] = tmp_path_factory.mktemp("alone")
            alone = Strategy(microbatches=strategy.microbatches)
            made = verify.StrategyTrial(source=source, strategy=alone, steps=2, float64=True, folder=str(places[key]))
            workers(1, verify.record, made)
        return verify.StrategyTrial(source=source, strategy=strategy, steps=2, float64=True, folder=str(places[key]))

    return get


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        ("llama", "fsdp=2,tp=2"),
        ("gemma", "fsdp=2"),
        ("gemma", "pp=2"),
        ("gpt2", "tp=2"),
        ("mixtral", "tp=2"),
        ("plain", "tp=2"),
    ],
)
def test_trains_as_in_one_process(
    model: str, strategy: str, workers: Pools, recorded: Callable[[str, Strategy], verify.StrategyTrial]
) -> None:
    trial = recorded(model, Strategy.parse(strategy).for_batch(8))
    proof = workers(trial.strategy.workers, compare, trial)[0]
    assert proof.passed, proof
    assert max(proof.loss.error, proof.gradient.error, proof.parameter.error) < 1e-10


def compare(trial: verify.StrategyTrial) -> verify.Proof | None:
    with remembered((trial.source, trial.float64)):
        return verify.compare(trial)


def test_weights_that_have_to_be_converted_are_read_whole_and_said(folders: Path) -> None:
    workload = load_workload(str(folders / "mixtral"), SETTINGS)
    assert any("every worker reads all weights" in note for note in workload.notes)
    model, expected = workload.model(), stored(folders / "mixtral")
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])


def test_names_without_the_prefix(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "gpt2", tmp_path / "gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in stored(folders / "gpt2").items()}
    save_file(tensors, tmp_path / "gpt2" / SINGLE, metadata={"format": "pt"})
    workload = load_workload(str(tmp_path / "gpt2"), SETTINGS)
    assert isinstance(workload.model, StoredModel)
    assert workload.model.weights.keys["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert workload.model.weights.keys["lm_head.weight"] == "wte.weight"


def test_other_tasks(tmp_path: Path) -> None:
    import transformers

    masked = transformers.BertConfig(**SIZES, architectures=["BertForMaskedLM"])
    masked.save_pretrained(tmp_path / "bert")
    start: dict[str, Any] = {"decoder_start_token_id": 0}  # which not every kind of model declares
    t5 = transformers.T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=1, **start)
    t5.save_pretrained(tmp_path / "t5")
    labels: dict[str, Any] = {"num_labels": 10}
    vit = transformers.ViTConfig(hidden_size=32, num_attention_heads=4, image_size=32, patch_size=8, **labels)
    vit.save_pretrained(tmp_path / "vit")
    for model, inputs in (
        ("bert", {"input_ids"}),
        ("t5", {"input_ids", "decoder_input_ids"}),
        ("vit", {"pixel_values"}),
    ):
        workload = load_workload(str(tmp_path / model), SETTINGS if model != "vit" else {})
        batch = torch.utils.data.default_collate([workload.dataset[index] for index in range(2)])
        given = workload.inputs(batch)
        assert set(given) == inputs
        loss = workload.loss(workload.model()(**given), batch)
        assert loss.shape == ()
        assert 1 < float(loss) < 20


def test_the_task_of_a_bare_model(tmp_path: Path) -> None:
    from shardwise.workload.recipes.pretrained.architecture import architecture_of

    for kind, bare, expected in (
        ("bert", "BertModel", "BertForMaskedLM"),
        ("bart", "BartModel", "BartForConditionalGeneration"),
        ("llama", "LlamaModel", "LlamaForCausalLM"),
    ):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [bare]}))
        assert architecture_of(tmp_path / kind).name == expected


def test_stored_buffers_are_read(tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "num_labels": 10,
    }
    sizes["image_size"] = 32
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.fill_(3.0)
    model.save_pretrained(tmp_path)
    made = load_workload(str(tmp_path)).model()
    means = [buffer for name, buffer in made.named_buffers() if name.endswith("running_mean")]
    assert means
    assert all(bool((buffer == 3).all()) for buffer in means)
    assert all(parameter.is_meta for parameter in made.parameters())


def test_text_in_tokens_of_the_folder(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(folders / "plain", tmp_path / "words")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b a c " * 200)
    workload = load_workload(str(tmp_path / "words"), {**SETTINGS, "data": str(tmp_path / "text.txt")})
    assert workload.dataset[0]["tokens"][:8].tolist() == [1, 2, 1, 0, 1, 2, 1, 0]


def test_what_is_wrong_is_one_line(folders: Path, tmp_path: Path) -> None:
    def refused(match: str, folder: Path, settings: dict[str, str] | None = None) -> None:
        with pytest.raises(WorkloadError, match=match) as raised:
            load_workload(str(folder), SETTINGS if settings is None else settings)
        assert "\n" not in str(raised.value)

    (tmp_path / "empty").mkdir()
    refused("is a folder without a config.json", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused("config.json cannot be read", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "sam"}))
    refused("sam is neither a causal", tmp_path / "empty")
    plain = json.loads((folders / "plain" / "config.json").read_text())
    (tmp_path / "empty" / "config.json").write_text(
        json.dumps({**plain, "quantization_config": {"quant_method": "fp8"}})
    )
    refused("the weights are quantized", tmp_path / "empty")
    shutil.copytree(folders / "llama", tmp_path / "part")
    files = set(json.loads((tmp_path / "part" / INDEX).read_text())["weight_map"].values())
    (tmp_path / "part" / sorted(files)[0]).unlink()
    refused("are not whole: model-00001", tmp_path / "part")
    refused("no parameter 'sequnce'", folders / "llama", {"sequnce": "3"})


def test_a_weight_of_another_shape_is_named(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "gemma", tmp_path / "gemma")
    tensors = stored(folders / "gemma")
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, tmp_path / "gemma" / SINGLE, metadata={"format": "pt"})
    with pytest.raises(WorkloadError, match=r"model.norm.weight is stored with shape \(31,\), the model has \(32,\)"):
        built(str(tmp_path / "gemma"), "single")


def test_parameters_on_meta_and_no_weights() -> None:
    from shardwise.parallel.program import Program

    def model() -> torch.nn.Module:
        with without_parameters():
            return torch.nn.Linear(2, 2)

    workload = Workload(
        name="empty",
        model=model,
        dataset=[torch.ones(2)] * 8,
        inputs=lambda batch: batch,
        loss=lambda output, batch: output.mean(),
        optimizer=torch.optim.AdamW,
        batch_size=8,
    )
    with pytest.raises(WorkloadError, match="on the meta device, without values"):
        Program.build(workload, Strategy())
