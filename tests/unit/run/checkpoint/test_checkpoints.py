from __future__ import annotations

import json
import logging
import pickletools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from standin import SGD, StandIn, adam_like
from torch import Tensor, nn

from shardwise.errors import CheckpointError, RunFolderError, ShardwiseError
from shardwise.parallel.state.layout import Layout, Tile
from shardwise.run.checkpoint import writer
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors
from shardwise.run.checkpoint.folder import begin
from shardwise.run.checkpoint.index import Index
from shardwise.run.checkpoint.safetensors_file import TensorSpec, write_tensors


def saved(run: Path, *steps: int, keep: int = 3) -> Checkpoints:
    """A run with a checkpoint after each of `steps`, made of `adam_like(step)`."""
    checkpoints = Checkpoints(run, keep)
    for step in steps:
        checkpoints.save(StandIn(*adam_like(step), steps=step), {"epoch": 1, "batch": step})
    checkpoints.wait()
    return checkpoints


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(checkpoints: Checkpoints) -> Path:
    path = checkpoints.latest()
    assert path is not None
    return path


def blank(**changes: Any) -> StandIn:
    return StandIn({name: torch.zeros_like(tensor) for name, tensor in adam_like()[0].items()}, **changes)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def damage(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_everything_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    checkpoints = saved(tmp_path, 20)
    expected_draw = torch.rand(3)
    program = blank()
    torch.manual_seed(99)
    progress = Checkpoints(tmp_path).load(program, newest(checkpoints))
    assert progress == {"epoch": 1, "batch": 20}
    assert program.steps == 20
    assert torch.equal(torch.rand(3), expected_draw)
    assert_same(program.locals(), StandIn(*adam_like(20)).locals())


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    folder = newest(saved(tmp_path, 1))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "manifest.json", "rank-00000.safetensors"]
    for path in folder.iterdir():
        with pytest.raises(ValueError, match=r"opcode|pickle"):
            list(pickletools.genops(path.read_bytes()))
    assert torch.equal(load_file(folder / "rank-00000.safetensors")["model/norm.bias"], adam_like(1)[0]["norm.bias"])


def test_training_may_change_the_tensors_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(writer, "begin", _held_up(begin, go))
    checkpoints, program = Checkpoints(tmp_path), StandIn(*adam_like(3), steps=3)
    progress = {"losses": [1.0]}
    checkpoints.save(program, progress)
    assert checkpoints.latest() is None
    program.fill(0)
    progress["losses"].append(2.0)
    go.set()
    checkpoints.wait()
    loaded = blank()
    assert checkpoints.load(loaded, newest(checkpoints)) == {"losses": [1.0]}
    assert_same(loaded.locals(), StandIn(*adam_like(3)).locals())


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []

    def slow(*args: Any) -> Any:
        assert not running
        running.append(1)
        time.sleep(0.02)
        running.pop()
        return write_tensors(*args)

    monkeypatch.setattr(writer, "write_tensors", slow)
    saved(tmp_path, 1, 2, 3)
    assert len(folders(tmp_path)) == 3


def _held_up(function: Callable[..., Any], go: threading.Event) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        assert go.wait(10)
        return function(*args)

    return call


def test_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20, 30, 40, keep=2)
    assert folders(tmp_path) == ["step-00000030", "step-00000040"]
    assert newest(checkpoints).name == "step-00000040"
    saved(tmp_path, 50, keep=1)
    assert folders(tmp_path) == ["step-00000050"]
    with pytest.raises(CheckpointError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_protected_ones_stay_besides_the_last_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.protected = {10, 30}
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(StandIn(*adam_like(step), steps=step), {})
    checkpoints.wait()
    assert folders(tmp_path) == ["step-00000010", "step-00000030", "step-00000040", "step-00000050"]
    checkpoints.protected = {10}
    checkpoints.save(StandIn(*adam_like(60), steps=60), {})
    checkpoints.wait()
    assert folders(tmp_path) == ["step-00000010", "step-00000050", "step-00000060"]


def test_going_back_never_deletes_what_was_just_written(tmp_path: Path) -> None:
    saved(tmp_path, 20, 40, 60, 80)
    saved(tmp_path, 50, keep=1)
    assert folders(tmp_path) == ["step-00000050", "step-00000060", "step-00000080"]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(StandIn(*adam_like(77), steps=10), {"again": True})
    checkpoints.wait()
    assert folders(tmp_path) == ["step-00000010"]
    program = blank()
    assert checkpoints.load(program, newest(checkpoints)) == {"again": True}
    assert_same(program.locals(), StandIn(*adam_like(77)).locals())


def test_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    final = newest(saved(tmp_path, 10))
    final.rename(final.with_name(".step-00000010.replaced"))
    (final.with_name(".step-00000010.partial")).mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load(blank(), newest(checkpoints))["batch"] == 10
    saved(tmp_path, 5)
    assert folders(tmp_path) == [".step-00000010.replaced", "step-00000005"]
    saved(tmp_path, 10)
    assert folders(tmp_path) == ["step-00000005", "step-00000010"]
    final.rename(final.with_name(".step-00000010.replaced"))
    saved(tmp_path, 20, keep=1)
    assert folders(tmp_path) == ["step-00000020"]


def test_what_kills_left_is_cleared_away_but_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    parent = tmp_path / "checkpoints"
    for name in (".step-00000020.partial", ".step-00000005.deleted", ".step-00000010.replaced", ".mine", "step-old"):
        (parent / name).mkdir()
        (parent / name / "file").write_text("x")
    assert newest(Checkpoints(tmp_path)).name == "step-00000010"
    saved(tmp_path, 30)
    assert folders(tmp_path) == [".mine", "step-00000010", "step-00000030", "step-old"]


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    broken = newest(checkpoints) / name
    if how == "flipped":
        damage(broken, at=len(broken.read_bytes()) // 2)
    elif how == "cut":
        broken.write_bytes(broken.read_bytes()[:-1])
    else:
        broken.unlink()
    with caplog.at_level(logging.WARNING):
        assert newest(checkpoints).name == "step-00000010"
    (record,) = (record for record in caplog.records if record.name.startswith("shardwise"))
    assert name in record.message
    assert "step-00000020" in record.message
    assert "\n" not in record.message
    program = blank()
    with pytest.raises(CheckpointError, match=name):
        checkpoints.load(program, broken.parent)
    assert_same(program.locals(), blank().locals())


def test_all_damaged_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new").latest() is None
    checkpoints = saved(tmp_path, 10)
    damage(newest(checkpoints) / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be used: .*rank-00000.safetensors"):
        checkpoints.latest()


def test_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-00000007 is not there"):
        Checkpoints(tmp_path).load(blank(), tmp_path / "checkpoints" / "step-00000007")


def test_other_models_are_refused_before_anything_changes(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    path, zeros = newest(checkpoints), {n: torch.zeros_like(t) for n, t in adam_like()[0].items()}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (zeros | {"norm.bias": torch.zeros(8).double()}, r"norm.bias has shape \(7,\) there and \(8,\) here"),
        (zeros | {"extra": torch.zeros(2, 3)}, r"has no extra, here of shape \(2, 3\)"),
        ({n: t for n, t in zeros.items() if n != "mask"}, r"has mask of shape \(5, 3\), which is not here"),
        (zeros | {"norm.bias": torch.zeros(7)}, "norm.bias as torch.float64, here it is torch.float32"),
    ]
    for model, message in cases:
        program = StandIn(model)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(program, path)
        assert_same(program.locals(), StandIn(model).locals())
    with pytest.raises(CheckpointError, match="with AdamW, here it is SGD"):
        checkpoints.load(blank(kind=SGD), path)
    stepped = StandIn(zeros, {"mask/momentum": torch.ones(5, 3)})
    with pytest.raises(CheckpointError, match="no optimizer/mask/momentum"):
        checkpoints.load(stepped, path)


def test_format_of_a_later_version(tmp_path: Path) -> None:
    path = newest(saved(tmp_path, 1))
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        Index.read(path)


def shuffled(name: str, shape: tuple[int, ...]) -> tuple[Layout, bool]:
    """The rows of larger tensors in reverse blocks, as no strategy would have them, and an empty tile."""
    if len(shape) < 2:
        return Layout.whole(shape), True
    cut, rest = shape[0] // 3, shape[1:]
    zeros = (0,) * len(rest)
    return Layout(
        shape,
        (
            Tile((cut, *zeros), (shape[0] - cut, *rest), (0, *zeros)),
            Tile((0, *zeros), (cut, *rest), (shape[0] - cut, *zeros)),
            Tile((shape[0], *zeros), (0, *rest), (shape[0], *zeros)),
        ),
    ), True


def test_tiles_go_to_their_places(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(StandIn(*adam_like(2), split=shuffled, steps=2), {})
    checkpoints.wait()
    plain, again = blank(), blank(split=shuffled)
    checkpoints.load(plain, newest(checkpoints))
    checkpoints.load(again, newest(checkpoints))
    assert_same(plain.locals(), StandIn(*adam_like(2)).locals())
    assert_same(again.locals(), StandIn(*adam_like(2), split=shuffled).locals())


def test_tensors_without_elements(tmp_path: Path) -> None:
    checkpoints, program = Checkpoints(tmp_path), StandIn({"empty": torch.zeros(0, 4), "one": torch.ones(1)})
    checkpoints.save(program, {})
    checkpoints.wait()
    checkpoints.load(program, newest(checkpoints))
    export_safetensors(tmp_path, tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"empty": torch.zeros(0, 4), "one": torch.ones(1)})


def test_a_failed_write_is_raised_and_the_next_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full)
        checkpoints.save(StandIn(*adam_like(2), steps=2), {})
        with pytest.raises(ShardwiseError, match=r"step-00000002 could not be written by worker 0: .*No space left"):
            checkpoints.wait()
    assert newest(checkpoints).name == "step-00000001"
    checkpoints.save(StandIn(*adam_like(3), steps=3), {})
    checkpoints.wait()
    assert folders(tmp_path) == ["step-00000001", "step-00000003"]


def test_element_that_nobody_writes_is_found(tmp_path: Path) -> None:
    def half(name: str, shape: tuple[int, ...]) -> tuple[Layout, bool]:
        return (Layout.split(shape, 0, (shape[0],), 0, 2) if shape == (24, 6) else Layout.whole(shape)), True

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(StandIn(*adam_like(), split=half), {})
    with pytest.raises(ShardwiseError, match=r"attention.qkv.weight has 144 elements, the workers wrote 72"):
        checkpoints.wait()
    assert checkpoints.latest() is None


def test_file_with_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(ShardwiseError, match=r"tensor x is torch.complex128"):
        write_tensors(tmp_path / "x", {"x": TensorSpec(torch.complex128, (1,))}, lambda name: torch.zeros(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_export_is_the_plain_model(tmp_path: Path) -> None:
    model = Tied()
    assert model.norm.num_batches_tracked is not None
    model.norm.num_batches_tracked.fill_(7)
    tensors = {n: t.detach() for n, t in model.state_dict().items() if n != "head.weight"}
    program = StandIn(tensors, {"embed.weight/step": torch.tensor(1.0)}, split=shuffled)
    program.engine.aliases = {"head.weight": "embed.weight"}
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(program, {})
    checkpoints.wait()
    out = tmp_path / "new" / "model.safetensors"
    export_safetensors(tmp_path / "run", out)
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]
    fresh = Tied()
    fresh.load_state_dict(load_file(out), strict=True)
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    with pytest.raises(RunFolderError, match="is there already"):
        export_safetensors(tmp_path / "run", out)


def test_export_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run folder .*nowhere is not there"):
        export_safetensors(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        export_safetensors(tmp_path, tmp_path / "x")
    saved(tmp_path, 1)
    damage(tmp_path / "checkpoints" / "step-00000001" / "index.json")
    with pytest.raises(CheckpointError, match=r"index.json"):
        export_safetensors(tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()
