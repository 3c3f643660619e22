"""Tasks of Hugging Face folders: what is trained is what the folder names, from weights that the user is told of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pool import Pools
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate
from traces import remembered

from shardwise import Strategy, Workload
from shardwise.errors import DataError, RequestError, WorkloadError
from shardwise.run.verification import verify
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.pretrained.masked import IGNORED
from shardwise.workload.source import Source

PRELOAD = ("transformers.models.bert.modeling_bert",)
SIZES: dict[str, Any] = {**tiny.SIZES, "vocab_size": 300}
SETTINGS = {"sequence": "16"}
WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "good": 4, "bad": 5, "film": 6, "[MASK]": 7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: classifier and masked (BERT with weights and a tokenizer), bare (BertModel); data in reviews.csv."""
    import transformers

    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("tasks")
    labels: dict[str, Any] = {"num_labels": 3}
    config = transformers.BertConfig(**SIZES, **labels)
    for name, kind in (("classifier", "BertForSequenceClassification"), ("masked", "BertForMaskedLM")):
        getattr(transformers, kind)(config).save_pretrained(root / name)
        save_tokenizer(root / name / "tokenizer.json")
    transformers.BertModel(config).save_pretrained(root / "bare")
    rows = [f'"{"good " * (n % 5)}{"bad" if n % 2 else "film"}",{n % 3}' for n in range(30)]
    (root / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    return root


def save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)  # as a tokenizer is often stored: it must not cut the text
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))


def batch_of(workload: Workload, indices: Sequence[int] = range(4)) -> Any:
    return default_collate([workload.dataset[index] for index in indices])


def labelled(folders: Path, **settings: str) -> Workload:
    return load_workload(str(folders / "classifier"), {**SETTINGS, "data": str(folders / "reviews.csv"), **settings})


def test_a_classifier_is_trained_on_labelled_text(folders: Path) -> None:
    workload = labelled(folders)
    batch = batch_of(workload)
    assert batch["label"].max() < 3
    assert bool((batch["tokens"][:, 0] == WORDS["[CLS]"]).all())
    model = workload.model()
    assert type(model).__name__ == "BertForSequenceClassification"
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= dict(model.named_parameters()).keys()
    (evaluation,) = workload.evaluations
    assert evaluation.metric == "accuracy"
    assert len(workload.dataset) + len(evaluation.dataset) == 30


def test_padding_does_not_change_the_classes(folders: Path) -> None:
    import transformers

    model: torch.nn.Module = transformers.BertForSequenceClassification.from_pretrained(folders / "classifier")
    model.train(False)
    logits = []
    for sequence in ("12", "30"):
        workload = labelled(folders, sequence=sequence)
        logits.append(model(**workload.inputs(batch_of(workload))).logits)
    torch.testing.assert_close(*logits)


def test_the_mask_is_the_tokenizers_and_each_epoch_hides_other_tokens(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("good bad film " * 400)
    workload = load_workload(str(folders / "masked"), {**SETTINGS, "data": str(tmp_path / "text.txt")})
    first = batch_of(workload, range(20))
    hidden = first["targets"] != IGNORED
    assert hidden.sum(1).tolist() == [2] * 20
    changed = first["tokens"][hidden] != first["targets"][hidden]
    masks = first["tokens"][hidden] == WORDS["[MASK]"]
    assert 20 <= int(masks.sum()) < 40
    assert bool((first["tokens"][~hidden] != WORDS["[MASK]"]).all())
    assert int(changed.sum()) >= int(masks.sum())
    assert len({tuple(row) for row in hidden.tolist()}) > 10  # other places in each sample
    workload.dataset.set_epoch(1)
    assert not torch.equal(batch_of(workload, range(20))["targets"], first["targets"])
    workload.dataset.set_epoch(0)
    assert torch.equal(batch_of(workload, range(20))["targets"], first["targets"])


def test_the_loader_names_the_epoch(folders: Path, tmp_path: Path) -> None:
    from shardwise.workload.reading.loader import Loader

    seen = []

    class Numbered(list[int]):
        def set_epoch(self, epoch: int) -> None:
            seen.append(epoch)

    for epoch in (0, 3):
        list(Loader(dataset=Numbered(range(4)), batch_size=2).shares(epoch))
    assert seen == [0, 3]


def test_a_named_mask_token_that_is_not_there_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "masked", tmp_path / "masked")
    (tmp_path / "masked" / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<m>"}}))
    with pytest.raises(DataError, match=r"has no mask token \(<m>\)"):
        load_workload(str(tmp_path / "masked"), SETTINGS)


def test_all_of_ones_own_text_is_tokenized(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.workload.recipes.pretrained import tokens

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "SAMPLE_BYTES", 100)
    monkeypatch.setattr(tokens, "_BLOCK_BYTES", 64)
    (tmp_path / "text.txt").write_text("good bad film\n" * 400)
    workload = load_workload(str(folders / "masked"), {**SETTINGS, "data": str(tmp_path / "text.txt")})
    assert len(workload.dataset) == (400 * 3 * 9 // 10 - 1) // 16


def test_other_heads_are_refused_by_name(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "masked", tmp_path / "tags")
    path = tmp_path / "tags" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["BertForTokenClassification"]}))
    with pytest.raises(WorkloadError, match=r"BertForTokenClassification is neither .*file.py:function"):
        load_workload(str(tmp_path / "tags"), SETTINGS)


def test_pickled_weights_are_refused_unless_random_ones_are_asked_for(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "masked", tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(WorkloadError, match=r"pytorch_model.bin is pickled.*save_pretrained.*weights=random"):
        load_workload(str(tmp_path / "old"), SETTINGS)
    workload = load_workload(str(tmp_path / "old"), {**SETTINGS, "weights": "random"})
    assert "weights: random, as asked for (weights=random)" in workload.notes
    (tmp_path / "old" / "pytorch_model.bin").rename(tmp_path / "old" / "weights.safetensors")
    with pytest.raises(WorkloadError, match="rename it"):
        load_workload(str(tmp_path / "old"), SETTINGS)


def test_the_origin_of_weights_is_told(folders: Path, tmp_path: Path) -> None:
    assert (
        f"weights: {folders / 'masked' / 'model.safetensors'}"
        in load_workload(str(folders / "masked"), SETTINGS).notes[0]
    )
    new = load_workload(str(folders / "bare"), {"sequence": "16"})
    assert any("new in BertForMaskedLM, so random at first: cls.predictions" in note for note in new.notes)
    assert any("pooler.dense" in note and "neither trained nor exported" in note for note in new.notes)


def test_weights_of_another_size_or_part_are_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "classifier", tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    settings = {**SETTINGS, "data": str(folders / "reviews.csv")}
    with pytest.raises(WorkloadError, match=r"lacks bert.encoder.layer.1.output.dense.weight"):
        load_workload(str(tmp_path / "cut"), settings)


def test_defaults_are_those_of_fine_tuning(folders: Path, tmp_path: Path) -> None:
    def rate(workload: Workload) -> float:
        parameters = [torch.nn.Parameter(torch.ones(2, 2))]
        found: float = workload.optimizer(parameters).param_groups[0]["lr"]
        return found

    tuned = labelled(folders)
    assert rate(tuned) == 5e-5
    assert tuned.schedule is not None
    assert tuned.precision == "float32"
    fresh = labelled(folders, weights="random")
    assert rate(fresh) == 3e-4
    assert fresh.schedule is None
    assert rate(labelled(folders, learning_rate="0.01")) == 0.01
    shutil.copytree(folders / "classifier", tmp_path / "half")
    path = tmp_path / "half" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    settings = {**SETTINGS, "data": str(folders / "reviews.csv")}
    assert load_workload(str(tmp_path / "half"), settings).precision == "bf16"
    assert load_workload(str(tmp_path / "half"), {**settings, "precision": "float32"}).precision == "float32"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("text,label\nx,7\n", "class 7, BertForSequenceClassification has 3 classes"),
        ("words,label\nx,1\n", "row 1: has no text and label"),
        ("text,label\n", "no texts in it"),
    ],
)
def test_wrong_labelled_text_is_one_line(content: str, match: str, folders: Path, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(RequestError, match=match) as raised:
        labelled(folders, data=str(tmp_path / "data.csv"))
    assert "\n" not in str(raised.value)


def test_text_without_labels_is_refused(folders: Path) -> None:
    with pytest.raises(DataError, match="give labelled text with data="):
        load_workload(str(folders / "classifier"), SETTINGS)


def test_names_of_labels_and_a_validation_file(folders: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "good film", "label": label}) for label in ("positive", "negative", "neutral")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text(lines[0])
    workload = labelled(folders, data=str(tmp_path))
    assert [int(workload.dataset[n]["label"]) for n in range(3)] == [2, 0, 1]
    (evaluation,) = workload.evaluations
    assert len(evaluation.dataset) == 1


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
@pytest.mark.parametrize("model", ["classifier", "masked"])
def test_trains_as_in_one_process(
    model: str, strategy: str, folders: Path, workers: Pools, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = {**SETTINGS, "data": str(folders / "reviews.csv")} if model == "classifier" else SETTINGS
    source = Source(workload=str(folders / model), settings=settings)
    chosen = Strategy.parse(strategy).for_batch(8)
    folder = str(tmp_path_factory.mktemp("alone"))
    alone = Strategy(microbatches=chosen.microbatches)
    workers(1, verify.record, verify.StrategyTrial(source=source, strategy=alone, steps=2, float64=True, folder=folder))
    trial = verify.StrategyTrial(source=source, strategy=chosen, steps=2, float64=True, folder=folder)
    proof = workers(2, compare, trial)[0]
    assert proof.passed, proof
    assert max(proof.loss.error, proof.gradient.error, proof.parameter.error) < 1e-10


def compare(trial: verify.StrategyTrial) -> verify.Proof | None:
    with remembered((trial.source, trial.float64)):
        return verify.compare(trial)
