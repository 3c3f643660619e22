"""The recipes: their models trace, their losses are means over samples, and nothing held out is trained on."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from shardwise.errors import DataError
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.datasets import cache
from shardwise.workload.recipes.datasets.splits import split_names, stratified_split
from shardwise.workload.recipes.language import next_token_loss
from shardwise.workload.recipes.medical import dice, segmentation_loss
from shardwise.workload.recipes.models.gpt import GPT, CausalAttention
from shardwise.workload.recipes.training import adamw, warmup_cosine
from shardwise.workload.workload import Workload

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("image", {"layers": 2, "hidden": 16, "heads": 2}),
    "resnet": ("image", {"model": "resnet", "layers": 3, "hidden": 16}),
    "gpt": ("language", {"layers": 2, "hidden": 16, "heads": 2, "sequence": 16}),
    "tied-gpt": ("language", {"layers": 1, "hidden": 16, "heads": 2, "sequence": 8, "tied": True}),
    "unet": ("medical", {"patch": 16, "channels": 4, "levels": 2}),
    "batch-norm-unet": ("medical", {"patch": 16, "channels": 4, "levels": 2, "norm": "batch"}),
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One cache for this file's tests, so that the user's own is neither used nor filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=SMALL)
def workload(request: pytest.FixtureRequest) -> Workload:
    recipe, settings = SMALL[request.param]
    return load_workload(recipe, settings)


def batch_of(workload: Workload, count: int, start: int = 0) -> Any:
    return default_collate([workload.dataset[start + index] for index in range(count)])


def test_trains(workload: Workload) -> None:
    torch.manual_seed(0)
    model = workload.model()
    optimizer = workload.optimizer(model.parameters())
    assert workload.schedule is not None
    schedule = workload.schedule(optimizer)
    batch = batch_of(workload, 4)
    losses = []
    for _ in range(5):
        loss = workload.loss(model(workload.inputs(batch)), batch)
        assert loss.shape == ()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_evaluates(workload: Workload) -> None:
    evaluation = workload.evaluations[0]
    assert evaluation is not None
    model = workload.model().eval()
    batch = default_collate([evaluation.dataset[0], evaluation.dataset[1]])
    value = evaluation.measure(model(workload.inputs(batch)), batch)
    assert value.shape == ()
    assert math.isfinite(value.item())


@pytest.mark.parametrize("samples", [1, 3])
def test_traces_in_training(workload: Workload, samples: int) -> None:
    """No control flow depends on data, also for a batch of one, and the graph computes what the module does."""
    torch.manual_seed(0)
    model = workload.model().train()
    inputs = workload.inputs(batch_of(workload, samples))
    graph = torch.export.export(model, (inputs,), strict=False).module()
    torch.testing.assert_close(graph(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_loss_and_metric_are_means_over_samples(workload: Workload) -> None:
    model = workload.model().eval()  # without batch norm's statistics, which belong to the batch
    batch = batch_of(workload, 4)
    for measure in (workload.loss, workload.evaluations[0].measure):
        whole = measure(model(workload.inputs(batch)), batch)
        parts = []
        for index in range(4):
            part = {key: value[index : index + 1] for key, value in batch.items()}
            parts.append(measure(model(workload.inputs(part)), part))
        torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    for recipe, settings in SMALL.values():
        workload = load_workload(recipe, {**settings, "dropout": 0.5})
        model = workload.model()
        inputs = workload.inputs(batch_of(workload, 2))
        if settings.get("norm") != "batch" and settings.get("model") != "resnet":
            assert not torch.equal(model(inputs), model(inputs))
        model.eval()
        assert torch.equal(model(inputs), model(inputs))


def test_samples_are_deterministic_and_travel(workload: Workload) -> None:
    again = pickle.loads(pickle.dumps(workload.dataset))
    assert len(pickle.dumps(workload.dataset)) < 2_000_000
    assert len(again) == len(workload.dataset)
    for key, value in workload.dataset[5].items():
        assert torch.equal(value, again[5][key])


def test_digits_are_split_by_class() -> None:
    workload = load_workload("image")
    train, held_out = workload.dataset, workload.evaluations[0].dataset
    assert len(train) + len(held_out) == 1797
    shares = torch.bincount(held_out.labels) / (torch.bincount(held_out.labels) + torch.bincount(train.labels))
    assert ((shares > 0.19) & (shares < 0.21)).all()
    everything = torch.cat([train.images, held_out.images]).flatten(1)
    # all differ: nothing held out is in the training set
    assert len(everything.unique(dim=0)) == 1797  # type: ignore[no-untyped-call]


def test_interpolated_digits() -> None:
    workload = load_workload("image", {"image_size": "16", "layers": "1", "hidden": "16"})
    assert workload.dataset[0]["image"].shape == (1, 16, 16)
    assert workload.model()(workload.dataset[0]["image"][None]).shape == (1, 10)


def test_standard_library_holds_out_files() -> None:
    workload = load_workload("language", {"sequence": 64})
    train, held_out = workload.dataset, workload.evaluations[0].dataset
    assert len(held_out) == 256
    assert len(train) * 64 > 1_000_000
    assert train.span.tokens is not held_out.span.tokens
    first, second = train[0]["tokens"], train[1]["tokens"]
    assert first[-1] == second[0]  # every token but the first is a target once
    assert first.shape == (65,)


def test_brain_patches_do_not_overlap() -> None:
    workload = load_workload("medical", {"patch": 16})
    seen = {}
    for name, patches in (("train", workload.dataset), ("held_out", workload.evaluations[0].dataset)):
        voxels = np.zeros(patches.regions[0].case.shape, dtype=bool)
        for _, (x, y, z) in patches.places:
            voxels[x : x + 16, y : y + 16, z : z + 16] = True
        seen[name] = voxels
    assert not (seen["train"] & seen["held_out"]).any()
    assert seen["held_out"].mean() > 0.05
    labels = torch.stack([workload.dataset[i]["label"] for i in range(0, len(workload.dataset), 20)])
    assert labels.unique().tolist() == [0, 1, 2]  # type: ignore[no-untyped-call]


def test_bits_per_byte_of_even_chances() -> None:
    tokens = torch.randint(256, (2, 9))
    loss = next_token_loss(torch.zeros(2, 8, 256), {"tokens": tokens})
    assert loss.item() / math.log(2) == pytest.approx(8)


def test_dice_by_hand() -> None:
    label = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0], [0, 0, 1, 1]]).view(3, 1, 2, 2)
    predicted = torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0], [2, 0, 1, 1]]).view(3, 1, 2, 2)
    logits = 100 * torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    # sample 0: classes 2/3 and 1; sample 1: nothing there, nothing found; sample 2: class 1 right, class 2 invented
    expected = ((2 / 3 + 1) / 2 + 1 + 1 / 2) / 3
    assert dice(logits, {"label": label}).item() == pytest.approx(expected)
    perfect = 100 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    assert segmentation_loss(perfect, {"label": label}).item() == pytest.approx(0, abs=1e-5)


def test_splits() -> None:
    train, held_out = stratified_split([0] * 10 + [1] * 2 + [2])
    assert sorted(train + held_out) == list(range(13))
    assert sum(i < 10 for i in held_out) == 2
    assert sum(10 <= i < 12 for i in held_out) == 1
    assert 12 in train
    kept, taken = split_names(["a", "b", "c"], 0.01)
    assert len(taken) == 1
    assert sorted(kept + taken) == ["a", "b", "c"]


def test_schedule_rises_then_falls() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = adamw(1.0, 0.1)([parameter])
    schedule = warmup_cosine(100)(optimizer)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1
    assert rates.index(1) in (9, 10)
    assert rates[-1] == pytest.approx(0.02)


def test_optimizer_decays_matrices_only() -> None:
    groups = adamw(1e-3, 0.1)([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(0, 0.1), (1, 0.0)]


# what users bring


def paint(folder: Path, count: int, size: tuple[int, int] = (20, 12)) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(str(folder)))
    for number in range(count):
        pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_image_folder(tmp_path: Path) -> None:
    paint(tmp_path / "cat", 5)
    paint(tmp_path / "dog", 10)
    settings = {"data": str(tmp_path), "image_size": "16", "hidden": "16", "layers": "1"}
    workload = load_workload("image", settings)
    assert (len(workload.dataset), len(workload.evaluations[0].dataset)) == (12, 3)
    files = {path for path, _ in workload.dataset.files} & {path for path, _ in workload.evaluations[0].dataset.files}
    assert not files
    batch = batch_of(workload, 3)
    assert batch["image"].shape == (3, 3, 16, 16)
    assert workload.model()(batch["image"]).shape == (3, 2)
    large = load_workload("image", {**settings, "model": "resnet", "layers": "3", "image_size": "64"})
    assert large.model()(batch_of(large, 2)["image"]).shape == (2, 2)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        paint(tmp_path / split / "a", count)
        paint(tmp_path / split / "b", count)
    workload = load_workload("image", {"data": str(tmp_path)})
    assert (len(workload.dataset), len(workload.evaluations[0].dataset)) == (6, 4)
    paint(tmp_path / "test" / "c", 1)
    with pytest.raises(DataError, match="class 'c' has no images to train on; known are a, b"):
        load_workload("image", {"data": str(tmp_path)})


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in it"):
        load_workload("image", {"data": str(tmp_path)})
    paint(tmp_path / "a", 2)
    broken = tmp_path / "a" / "2.png"
    broken.write_bytes(b"not an image")
    workload = load_workload("image", {"data": str(tmp_path)})
    samples = [(d, i) for d in (workload.dataset, workload.evaluations[0].dataset) for i in range(len(d))]
    with pytest.raises(DataError, match=r"2\.png cannot be read as an image"):
        list(dataset[index] for dataset, index in samples)  # noqa: C400


TINY_GPT = {"layers": "1", "hidden": "16", "heads": "2", "sequence": "8"}


def test_text_files(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} " * 20)
    (tmp_path / "picture.bin").write_bytes(b"\0\1\2" * 100)
    for data in (tmp_path, tmp_path / "*.txt"):
        workload = load_workload("language", {**TINY_GPT, "data": str(data)})
        train = bytes(workload.dataset.span.tokens.array)
        held_out = bytes(workload.evaluations[0].dataset.span.tokens.array)
        assert train.count(b"text number") == 60
        assert held_out.count(b"text number") == 20
        assert not {line[:13] for line in train.split(b"\n")} & {line[:13] for line in held_out.split(b"\n")}
    (tmp_path / "0.txt").write_text("changed text " * 20)
    changed = load_workload("language", {**TINY_GPT, "data": str(tmp_path)})
    both = bytes(changed.dataset.span.tokens.array) + bytes(changed.evaluations[0].dataset.span.tokens.array)
    assert b"changed text" in both


def test_one_text_file(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("0123456789" * 20)
    workload = load_workload("language", {**TINY_GPT, "data": str(tmp_path / "book.txt")})
    assert (workload.dataset.span.first, workload.dataset.span.last) == (0, 180)
    assert (workload.evaluations[0].dataset.span.first, workload.evaluations[0].dataset.span.last) == (180, 200)
    assert workload.evaluations[0].metric == "bits_per_byte"


def words(workload: Workload) -> int:
    model = workload.model()
    assert isinstance(model, GPT)
    return model.embedding.num_embeddings


def test_token_files(tmp_path: Path) -> None:
    tokens = np.arange(1000) % 300
    tokens.astype("<u2").tofile(tmp_path / "all.bin")
    np.save(tmp_path / "all.npy", tokens)
    for name in ("all.bin", "all.npy"):
        workload = load_workload("language", {**TINY_GPT, "data": str(tmp_path / name)})
        assert workload.evaluations[0].metric == "bits_per_token"
        assert torch.equal(workload.dataset[2]["tokens"], torch.arange(16, 25))
        assert words(workload) == 320
    for name in ("train", "val"):
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
    workload = load_workload("language", {**TINY_GPT, "data": str(tmp_path), "vocabulary": "512"})
    assert (workload.dataset.span.last, words(workload)) == (1000, 512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "empty"}, "no text files in it"),
        ({"data": "none*.txt"}, "there is no such file"),
        ({"data": "nothing.txt"}, "there is no such file with anything in it"),
        ({"data": "short.txt"}, "the text has only 9 tokens; use 8 or less"),
        ({"data": "all.bin", "vocabulary": "100"}, "holds token 299; use 300 or more"),
        ({"data": "odd.bin"}, "cannot be read as tokens"),
        ({"data": "float.npy"}, "must hold integers in one dimension"),
        ({"data": "negative.npy"}, "holds -1: token ids are 0 or more"),
    ],
)
def test_text_errors(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "short.txt").write_text("0123456789")
    (np.arange(1000) % 300).astype("<u2").tofile(tmp_path / "all.bin")
    (tmp_path / "odd.bin").write_bytes(b"")
    np.save(tmp_path / "float.npy", np.zeros(100))
    np.save(tmp_path / "negative.npy", np.full(100, -1))
    settings = {**TINY_GPT, "sequence": "16", **settings, "data": str(tmp_path / settings["data"])}
    with pytest.raises(DataError, match=message) as caught:
        load_workload("language", settings)
    assert "\n" not in str(caught.value)


def scan(path: Path, volume: Any) -> None:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(volume, dtype=np.float32), np.eye(4)), path)  # type: ignore[no-untyped-call]


def volumes(root: Path, names: list[str], *, images: str, labels: str, suffix: str = "") -> None:
    generator = np.random.default_rng(0)
    for name in names:
        scan(root / images / f"{name}{suffix}.nii.gz", generator.normal(size=(12, 20, 9)))
        scan(root / labels / f"{name}.nii.gz", generator.integers(0, 4, (12, 20, 9)))


TINY_UNET = {"patch": "8", "channels": "4", "levels": "2", "batch_size": "2"}


def test_volume_folder(tmp_path: Path) -> None:
    volumes(tmp_path, ["a", "b", "c"], images="images", labels="labels")
    workload = load_workload("medical", {**TINY_UNET, "data": str(tmp_path)})
    assert len(workload.dataset.regions) == 2
    assert len(workload.evaluations[0].dataset.regions) == 1
    batch = batch_of(workload, 2)
    assert batch["image"].shape == (2, 1, 8, 8, 8)
    assert workload.model()(batch["image"]).shape == (2, 4, 8, 8, 8)


def test_nnunet_folder_with_channels(tmp_path: Path) -> None:
    for channel in ("_0000", "_0001"):
        volumes(tmp_path, ["case_1", "case_10"], images="imagesTr", labels="labelsTr", suffix=channel)
    volumes(tmp_path, ["case_2"], images="imagesTs", labels="labelsTs", suffix="_0000")
    with pytest.raises(DataError, match="different numbers of channels"):
        load_workload("medical", {**TINY_UNET, "data": str(tmp_path)})
    volumes(tmp_path, ["case_2"], images="imagesTs", labels="labelsTs", suffix="_0001")
    workload = load_workload("medical", {**TINY_UNET, "data": str(tmp_path)})
    assert [region.case.name for region in workload.evaluations[0].dataset.regions] == ["case_2"]
    assert workload.dataset[0]["image"].shape == (2, 8, 8, 8)


def test_one_volume_is_cut_into_slabs(tmp_path: Path) -> None:
    scan(tmp_path / "images" / "a.nii", np.random.default_rng(0).normal(size=(8, 30, 8)))
    scan(tmp_path / "labels" / "a.nii", np.ones((8, 30, 8)))
    workload = load_workload("medical", {**TINY_UNET, "data": str(tmp_path)})
    assert [corner[1] for _, corner in workload.evaluations[0].dataset.places] == [11]
    assert sorted(corner[1] for _, corner in workload.dataset.places) == [0, 3, 19, 22]


def test_volume_errors(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(DataError) as caught:
            load_workload("medical", {**TINY_UNET, "data": str(tmp_path)})
        return str(caught.value)

    assert "neither imagesTr/ and labelsTr/ nor images/ and labels/" in message()
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    assert "no NIfTI files" in message()
    scan(tmp_path / "labels" / "a.nii", np.ones((8, 8, 8)))
    assert "a.nii has no image" in message()
    scan(tmp_path / "images" / "a.nii", np.ones((8, 8, 9)))
    assert "they must agree" in message()
    scan(tmp_path / "images" / "a.nii", np.random.default_rng(0).normal(size=(8, 8, 8)))
    assert "use a smaller one" in message()  # too short to hold a slab out
    scan(tmp_path / "labels" / "a.nii", np.full((8, 8, 8), 0.5))
    assert "whole numbers" in message()
    (tmp_path / "images" / "a.nii").write_bytes(b"nothing")
    assert "cannot be read as NIfTI" in message()


# the cache


def test_cache_makes_an_array_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def build() -> cache.Array:
        made.append(1)
        return np.arange(5)

    for _ in range(2):
        assert cache.cached("numbers", ["key"], build).tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 1
    (file,) = (tmp_path / "shardwise").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert cache.cached("numbers", ["key"], build).tolist() == [0, 1, 2, 3, 4]  # cut short: made again
    assert len(made) == 2
    assert cache.cached("numbers", ["other"], build).tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 3


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache.cached("numbers", ["key"], lambda: np.arange(3)).tolist() == [0, 1, 2]


def test_attention_keeps_no_part_of_the_fused_projection_alive() -> None:
    """The backward pass needs rotated queries and keys, and values: values as a view would keep all of it."""
    attention, x = CausalAttention(16, 2, 2, 8, 0.0), torch.randn(3, 8, 16)
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(x)
    whole = x.nbytes * 3
    assert x.nbytes in saved
    assert whole not in saved
