"""Data and model folders from elsewhere: no wait, no full memory, no code; one line says what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shardwise.errors import RequestError, WorkloadError
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.datasets import text as texts
from shardwise.workload.recipes.datasets.images import MOST_PIXELS, ImageFiles, image_folder
from shardwise.workload.recipes.datasets.nifti import MOST_BYTES, open_nifti
from shardwise.workload.recipes.datasets.text import user_corpus
from shardwise.workload.recipes.datasets.volumes import volume_folder

MEMORY = 512 << 20
"""Bytes that the address space may grow by in a test: a bomb of gigabytes raises MemoryError."""


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    import nibabel  # noqa: F401  what is imported grows the address space too
    from PIL import Image, ImageOps  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as caught:
        read()
    message = str(caught.value)
    assert message.isprintable()
    return message


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def put_folder(path: Path) -> None:
    path.mkdir()


ODD: list[Callable[[Path], None]] = [put_pipe, put_device, put_socket, put_folder]
KINDS = ("a pipe", "a device", "a socket", "a folder")
odd_files = pytest.mark.parametrize("put", ODD, ids=lambda put: put.__name__)


def png(width: int, height: int) -> bytes:
    """A PNG whose header states any size, with a few bytes of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (3 * width + 1) * min(height, 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class TestImages:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("a", "b"):
            (tmp_path / "data" / name).mkdir(parents=True)
            for number in range(5):
                (tmp_path / "data" / name / f"{number}.png").write_bytes(png(8, 8))
        return tmp_path / "data"

    def test_sound(self, root: Path) -> None:
        assert image_folder(root, 8).train[0]["image"].shape == (3, 8, 8)

    @odd_files
    def test_what_is_no_file(self, put: Callable[[Path], None], root: Path) -> None:
        put(root / "a" / "odd.png")
        message = refusal(lambda: image_folder(root, 8))
        assert f"{root / 'a' / 'odd.png'}: is {KINDS[ODD.index(put)]}" in message

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("side", "message"),
        [(11_500, f"has 11500 x 11500 pixels: at most {MOST_PIXELS} are read"), (60_000, "3600000000 pixels")],
    )
    def test_a_bomb(self, side: int, message: str, root: Path) -> None:
        (root / "a" / "0.png").write_bytes(png(side, side))
        files = ImageFiles([(root / "a" / "0.png", 0)], 8)
        assert message in refusal(lambda: files[0])

    def test_a_program_that_is_called_an_image(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pillow hands PostScript to Ghostscript, whatever the file is called."""
        import PIL.EpsImagePlugin

        def run(*_: object, **__: object) -> None:
            raise AssertionError("Ghostscript was started")

        monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
        (root / "a" / "0.png").write_bytes(eps)
        files = ImageFiles([(root / "a" / "0.png", 0)], 8)
        assert "cannot be read as an image" in refusal(lambda: files[0])


def nifti(shape: tuple[int, ...], *, dtype: tuple[int, int] = (2, 8), start: float = 352.0) -> bytes:
    """The header of a NIfTI-1 file, without voxels."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<2h", header, 70, *dtype)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, start)
    header[344:348] = b"n+1\0"
    return bytes(header)


class TestVolumes:
    def test_sound(self, tmp_path: Path) -> None:
        for path, packed in ((tmp_path / "v.nii", bytes), (tmp_path / "v.nii.gz", gzip.compress)):
            path.write_bytes(packed(nifti((4, 4, 4)) + bytes(range(64))))
            assert np.asarray(open_nifti(path).dataobj).sum() == sum(range(64))

    @odd_files
    def test_what_is_no_file(self, put: Callable[[Path], None], tmp_path: Path) -> None:
        for name in ("images", "labels"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "v.nii.gz").write_bytes(gzip.compress(nifti((4, 4, 4)) + bytes(64)))
        put(tmp_path / "images" / "w.nii.gz")
        assert f"is {KINDS[ODD.index(put)]}" in refusal(lambda: volume_folder(tmp_path, 4))

    @pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
    def test_a_header_that_states_more_than_is_there(self, name: str, tmp_path: Path) -> None:
        content = nifti((1000, 1000, 1000)) + bytes(1000)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert "(1000, 1000, 1000) voxels of 953.7 MiB" in refusal(lambda: open_nifti(tmp_path / name))

    def test_a_bomb(self, tmp_path: Path) -> None:
        bomb = tmp_path / "v.nii.gz"
        bomb.write_bytes(gzip.compress(nifti((20_000, 20_000, 50))) + bytes(MOST_BYTES // 400))
        assert "of voxels: at most 8.0 GiB are read" in refusal(lambda: open_nifti(bomb))

    def test_extensions_without_end(self, tmp_path: Path) -> None:
        (tmp_path / "v.nii").write_bytes(nifti((4, 4, 4), start=2e9) + bytes(64))
        assert "begin at byte 2e+09" in refusal(lambda: open_nifti(tmp_path / "v.nii"))

    @pytest.mark.parametrize("content", [b"", b"\0" * 400, b"\x1f\x8b", nifti((-4, 4, 4)), nifti((4,), dtype=(77, 8))])
    def test_damaged(self, content: bytes, tmp_path: Path) -> None:
        for name in ("images", "labels"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "v.nii.gz").write_bytes(content if content[:1] == b"\x1f" else gzip.compress(content))
        assert "v.nii.gz" in refusal(lambda: volume_folder(tmp_path, 4))


class TestText:
    @pytest.mark.parametrize("put", ODD[:3], ids=lambda put: put.__name__)
    def test_what_is_no_file(self, put: Callable[[Path], None], tmp_path: Path) -> None:
        put(tmp_path / "odd.txt")
        assert f"is {KINDS[ODD.index(put)]}" in refusal(lambda: user_corpus(str(tmp_path / "odd.txt"), "uint16", None))

    @pytest.mark.parametrize("put", ODD[:3], ids=lambda put: put.__name__)
    def test_in_a_folder_it_is_no_text(self, put: Callable[[Path], None], tmp_path: Path) -> None:
        put(tmp_path / "odd.txt")
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("some text")
        assert len(user_corpus(str(tmp_path), "uint16", None).train.tokens.array) == len("some text")

    def test_more_than_memory(self, tmp_path: Path) -> None:
        with (tmp_path / "large.txt").open("wb") as file:
            file.truncate(texts.MOST_BYTES + 1)
        assert "more than 8.0 GiB of text" in refusal(lambda: user_corpus(str(tmp_path / "large.txt"), "uint16", None))

    def test_tokens_that_are_pickled(self, tmp_path: Path) -> None:
        np.save(tmp_path / "tokens.npy", np.array([{}], dtype=object), allow_pickle=True)
        assert "cannot be read as tokens" in refusal(lambda: user_corpus(str(tmp_path / "tokens.npy"), "uint16", None))


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}


class Mark:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore")
class TestHuggingFaceFolders:
    @pytest.fixture(autouse=True)
    def _bounded_memory(self) -> None:
        """Leave memory as in every other process: what transformers imports is large."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**LLAMA, **SMALL}))
        return tmp_path / "hf"

    def load(self, folder: Path) -> str:
        return refusal(lambda: load_workload(str(folder)).model())

    @pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
    @odd_files
    def test_what_is_no_file(self, put: Callable[[Path], None], name: str, folder: Path) -> None:
        put(folder / name)
        assert f"{folder / name}: is {KINDS[ODD.index(put)]}" in self.load(folder)

    def test_a_configuration_without_end(self, folder: Path) -> None:
        with (folder / "config.json").open("ab") as file:
            file.truncate(1 << 40)
        assert "is larger than 16.0 MiB" in self.load(folder)

    @pytest.mark.parametrize(
        "content", ["[" * 3000, "{", "[]", "null", '{"model_type": 3}', '{"a": ' * 3000, "9" * 5000]
    )
    def test_a_broken_configuration(self, content: str, folder: Path) -> None:
        (folder / "config.json").write_text(content)
        assert "config.json" in self.load(folder)

    @pytest.mark.parametrize("file", ["../model.safetensors", "/dev/zero", "", ".", "..", "a/b.safetensors", 3, None])
    def test_an_index_that_points_elsewhere(self, file: object, folder: Path) -> None:
        save_file({"a": torch.zeros(2)}, folder.parent / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        assert "is not the plain name of a file beside it" in self.load(folder)

    def test_an_index_of_what_the_file_has_not(self, folder: Path) -> None:
        save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
        assert "are not whole: one.safetensors has no b" in self.load(folder)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"attn_implementation": "evil/kernel"}, "is code from elsewhere"),
            ({"attn_implementation": "evil/kernel@main:run"}, "is code from elsewhere"),
            ({"transformers_weights": "pytorch_model.bin"}, "transformers_weights is not followed"),
        ],
    )
    def test_code_that_a_configuration_names(self, more: dict[str, str], message: str, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**LLAMA, **SMALL, **more}))
        assert message in self.load(folder)

    def test_an_adapter(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        assert "holds an adapter" in self.load(folder)

    def test_pickled_weights_are_not_read(self, folder: Path, tmp_path: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
        with pytest.raises(WorkloadError, match=r"pytorch_model.bin is pickled, and cannot be read"):
            load_workload(str(folder))
        workload = load_workload(str(folder), {"weights": "random"})
        workload.model()
        save_file({"other": torch.zeros(2)}, folder / "model.safetensors")
        with pytest.raises(WorkloadError, match=r"lacks .* of LlamaForCausalLM"):
            load_workload(str(folder))
        assert not (tmp_path / "ran").exists()
