"""Checkpoints made to do harm, with checksums that hold: each is refused in one line, by resuming and by export."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from signing import edit, joined, sign, split_file
from standin import StandIn, adam_like

from shardwise.errors import CheckpointError
from shardwise.parallel.optim.schedule import load_schedule_state, schedule_state
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.cover import cover_problem
from shardwise.run.checkpoint.export import export_safetensors

DATA = "rank-00000.safetensors"
QKV = "model/attention.qkv.weight"


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Ends a test that waits for a pipe, instead of the whole session."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(StandIn(*adam_like(6), steps=6), {"epoch": 1})
    checkpoints.wait()
    path = checkpoints.latest()
    assert path is not None
    return path


def refused(folder: Path, message: str) -> None:
    """Neither resuming nor export takes the checkpoint; nothing is changed, nothing is written."""
    run, out = folder.parents[1], folder.parents[1] / "out.safetensors"
    program = StandIn({name: torch.zeros_like(tensor) for name, tensor in adam_like()[0].items()})
    with pytest.raises(CheckpointError, match=message) as loading:
        Checkpoints(run).load(program, folder)
    assert not any(bool(tensor.any()) for tensor in program.locals().values())
    with pytest.raises(CheckpointError, match=message) as exporting:
        export_safetensors(run, out)
    assert not out.exists()
    assert not out.with_name(f".{out.name}.partial").exists()
    for info in (loading, exporting):
        assert len(str(info.value).splitlines()) == 1


def set_file(name: str) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        index["tensors"][QKV]["chunks"][0]["file"] = name

    return change


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "/dev/zero", "", ".", "index.json", "rank-1"])
def test_files_elsewhere(folder: Path, name: str) -> None:
    edit(folder, set_file(name))
    refused(folder, "is no file of this checkpoint")


def test_absolute_path_to_a_good_file(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / DATA
    secret.write_bytes((folder / DATA).read_bytes())
    edit(folder, set_file(str(secret)))
    refused(folder, "is no file of this checkpoint")


@pytest.mark.parametrize("name", ["../run.json", "/etc/passwd", "a/b", "..", "", "a\nb"])
def test_manifest_of_files_elsewhere(folder: Path, name: str) -> None:
    sign(folder, name)
    refused(folder, "is no plain name")


@pytest.mark.parametrize("name", [DATA, "index.json", "manifest.json"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "link", "folder"])
def test_no_regular_file(folder: Path, tmp_path: Path, name: str, target: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if target == "pipe":
        os.mkfifo(folder / name)
    elif target == "folder":
        (folder / name).mkdir()
    elif target == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        (folder / name).symlink_to(tmp_path / "elsewhere")
    else:
        (folder / name).symlink_to(target)
    refused(folder, f"{name} is no regular file")


def no_parts(index: Any) -> None:
    index["tensors"][QKV]["chunks"] = []


def too_large(index: Any) -> None:
    index["tensors"][QKV]["shape"] = [2**20, 2**20]


def same_part_twice(index: Any) -> None:
    tensor = index["tensors"][QKV]
    tensor["shape"] = [48, 6]
    (part,) = tensor["chunks"]
    tensor["chunks"] = [{**part, "key": f"{QKV}@{n},0", "offsets": [n, 0]} for n in (0, 24)]


def huge_part(index: Any) -> None:
    tensor = index["tensors"][QKV]
    tensor["shape"] = tensor["chunks"][0]["sizes"] = [2**16, 2**16]


def beyond_counting(index: Any) -> None:
    tensor = index["tensors"][QKV]
    tensor["shape"] = tensor["chunks"][0]["sizes"] = [2**40, 2**40]


def many_names(index: Any) -> None:
    index["aliases"] = {f"copy{n}": "attention.qkv.weight" for n in range(500)}


def other_dtype(index: Any) -> None:
    index["tensors"][QKV]["dtype"] = "int32"


def forgets_a_tensor(index: Any) -> None:
    del index["tensors"]["optimizer/norm.bias/step"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_parts, "has 144 elements, the workers wrote 0 in 0 parts"),
        (too_large, "has 1099511627776 elements, the workers wrote 144"),
        (same_part_twice, r"does not hold 'model/attention.qkv.weight@0,0'|holds .*, of which index.json says nothing"),
        (huge_part, r"holds 'model/attention.qkv.weight' as \('F32', \[24, 6\]\)"),
        (beyond_counting, "more than any memory holds"),
        (other_dtype, r"as \('F32', \[24, 6\]\), index.json says \('I32', \[24, 6\]\)"),
        (forgets_a_tensor, "holds 'optimizer/norm.bias/step', of which index.json says nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_index_that_says_what_is_not_there(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    refused(folder, message)


def test_small_file_is_not_written_many_times(folder: Path) -> None:
    edit(folder, many_names)
    with pytest.raises(CheckpointError, match="more than 64 times as many are not"):
        export_safetensors(folder.parents[1], folder.parents[1] / "out.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"steps": 7}}, "it is of step 7"),
        ({"state": {}}, "there is no 'steps' of the training's state"),
        ({"state": {"steps": "six"}}, "state.steps is 'six', here it is 0"),
        ({"random": "xyz"}, "the state of the random numbers is none"),
        ({"random": "00"}, "the state of the random numbers is none"),
        ({"random": "ff" * 5056}, "the state of the random numbers is none"),
    ],
)
def test_state_of_another_kind(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder, lambda index: index.update(change))
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(folder.parents[1]).load(StandIn(adam_like()[0]), folder)


def test_nested_too_deeply(folder: Path) -> None:
    (folder / "index.json").write_text("[" * 200_000)
    sign(folder)
    refused(folder, "nested too deeply")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[" * 100_000,
        json.dumps({QKV: {"dtype": "F32", "shape": [2**62, 16], "data_offsets": [0, 0]}}).encode(),
        json.dumps({QKV: {"dtype": "F32", "shape": [24, 6], "data_offsets": [0, 1 << 60]}}).encode(),
    ],
    ids=["empty", "cut", "deep", "large", "outside"],
)
def test_header_that_does_not_fit_its_file(folder: Path, header: bytes) -> None:
    _, body = split_file((folder / DATA).read_bytes())
    (folder / DATA).write_bytes(joined(header, body))
    sign(folder)
    refused(folder, DATA)


def test_header_longer_than_its_file(folder: Path) -> None:
    (folder / DATA).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    sign(folder)
    refused(folder, DATA)


def test_cover_is_exact() -> None:
    rows = [((0, 0), (2, 4)), ((2, 0), (1, 4)), ((3, 0), (3, 4))]
    grid = [((r, c), (3, 2)) for r in (0, 3) for c in (0, 2)]
    assert cover_problem((6, 4), rows) == ""
    assert cover_problem((6, 4), grid) == ""
    assert cover_problem((), [((), ())]) == ""
    assert cover_problem((0, 4), []) == ""
    assert cover_problem((6, 4), [*rows, ((6, 0), (0, 4))]) == ""
    assert "wrote 20 in 2 parts" in cover_problem((6, 4), rows[::2])
    assert "overlap" in cover_problem((6, 4), [((0, 0), (4, 4)), ((3, 0), (2, 4))])
    assert "overlap" in cover_problem((2, 2), [((0, 0), (1, 2)), ((0, 0), (1, 1)), ((1, 1), (1, 1))])
    assert "wrote 2 in 2 parts" in cover_problem((), [((), ())] * 2)
    assert "outside" in cover_problem((6, 4), [((3, 0), (6, 4))])
    assert "dimensions" in cover_problem((6, 4), [((0,), (24,))])


def test_cover_of_many_parts_is_quick() -> None:
    count = 20_000  # comparing each with each would take minutes
    assert cover_problem((count, 3), [((row, 0), (1, 3)) for row in reversed(range(count))]) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["scheduler"].update(step=5), "has 'step' among the counts of the scheduler"),
        (lambda state: state["scheduler"].update(optimizer=5), "has 'optimizer' among the counts of the scheduler"),
        (lambda state: state["groups"][0].update(betas=[0.1, 0.2, 0.3]), r"has 3 values where the optimizer has \(0.9"),
    ],
    ids=["method", "optimizer", "betas"],
)
def test_schedule_that_would_break_the_next_step(change: Any, message: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    state = json.loads(json.dumps(schedule_state(optimizer, scheduler)))
    load_schedule_state(optimizer, scheduler, state)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_schedule_state(optimizer, scheduler, state)
