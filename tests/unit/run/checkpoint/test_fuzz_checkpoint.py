"""Checkpoints edited at random, as they are and signed again: the original values or one line, never anything else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutate_bytes, mutate_document
from safetensors.torch import load_file
from signing import joined, sign, split_file
from standin import StandIn, adam_like
from torch import Tensor

from shardwise.errors import ShardwiseError
from shardwise.parallel.state.layout import Layout, Tile
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors

CASES = 300
"""Damaged files of each kind, signed and not."""

STEP, DATA, NAME = 6, "rank-00000.safetensors", "step-00000006"


def halves(name: str, shape: tuple[int, ...]) -> tuple[Layout, bool]:
    """Two parts of each tensor with an even number of rows."""
    if not shape or shape[0] % 2:
        return Layout.whole(shape), True
    cut, rest, zeros = shape[0] // 2, shape[1:], (0,) * (len(shape) - 1)
    tiles = [Tile((start, *zeros), (cut, *rest), (start, *zeros)) for start in (0, cut)]
    return Layout(shape, tuple(tiles)), True


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("original")
    program = StandIn(*adam_like(STEP), split=halves, steps=STEP)
    program.engine.aliases = {"tied": "norm.bias"}
    checkpoints = Checkpoints(run)
    checkpoints.save(program, {"epoch": 1, "loss": 0.5})
    checkpoints.wait()
    return run / "checkpoints" / NAME


def mutate_index(content: bytes, dice: random.Random) -> bytes:
    return mutate_document(json.loads(content), dice) if dice.random() < 0.8 else mutate_bytes(content, dice)


def mutate_data(content: bytes, dice: random.Random) -> bytes:
    header, body = split_file(content)
    how = dice.random()
    if how < 0.6:
        return joined(mutate_document(header, dice), body)
    if how < 0.8:
        return joined(json.dumps(header).encode(), mutate_bytes(body, dice))
    return mutate_bytes(content, dice)


def in_files(folder: Path, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of `names` from the files without the index, with parts put where their keys say."""
    stored, full = load_file(folder / DATA), {}
    for name, like in names.items():
        parts = {key: part for key, part in stored.items() if key.partition("@")[0] == name}
        if name in parts:
            full[name] = parts[name]
            continue
        full[name] = torch.empty_like(like)
        for key, part in parts.items():
            starts = map(int, key.partition("@")[2].split(","))
            box = tuple(slice(start, start + size) for start, size in zip(starts, part.shape, strict=True))
            full[name][box] = part
    return full


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return whether all bits are equal."""

    def bits(tensor: Tensor) -> tuple[Any, ...]:
        if tensor.dtype == torch.bool:  # true is any byte but 0 in a file, and 1 once it is copied
            tensor = tensor.view(torch.uint8) != 0
        return tensor.dtype, tensor.shape, bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())

    return actual.keys() == expected.keys() and all(bits(actual[n]) == bits(expected[n]) for n in expected)


def outcome(action: Callable[[], dict[str, Tensor]], expected: Callable[[], dict[str, Tensor]]) -> str:
    """`loaded`, or `refused`; fails on anything else."""
    try:
        found = action()
    except ShardwiseError as error:
        line = str(error)
    else:
        line = ""
    if line:
        assert len(line.splitlines()) == 1, line
        assert len(line) < 1000
        return "refused"
    assert same(found, expected())
    return "loaded"


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    ("name", "mutate"),
    [("index.json", mutate_index), (DATA, mutate_data), ("manifest.json", mutate_index)],
    ids=["index", "data", "manifest"],
)
def test_original_values_or_one_line(
    original: Path, tmp_path: Path, name: str, mutate: Callable[[bytes, random.Random], bytes], signed: bool
) -> None:
    model, optimizer = adam_like(STEP)
    first = {f"model/{n}": t for n, t in model.items()} | {f"optimizer/{n}": t for n, t in optimizer.items()}
    folder, out, counts = tmp_path / "checkpoints" / NAME, tmp_path / "out.safetensors", {"loaded": 0, "refused": 0}
    for case in range(CASES):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(original, folder)
        content = mutate((folder / name).read_bytes(), random.Random(f"{name} {case}"))
        (folder / name).write_bytes(content)
        if signed and name != "manifest.json":
            sign(folder)

        def expected() -> dict[str, Tensor]:
            return in_files(folder, first) if signed else first

        def load() -> dict[str, Tensor]:
            checkpoints = Checkpoints(tmp_path)
            program = StandIn({n: torch.zeros_like(t) for n, t in model.items()})
            path = checkpoints.latest()
            assert path == folder
            checkpoints.load(program, path)
            assert program.steps == STEP
            return program.locals()

        def export() -> dict[str, Tensor]:
            out.unlink(missing_ok=True)
            export_safetensors(tmp_path, out)
            return {f"model/{n}": t for n, t in load_file(out).items() if n in model}

        def weights() -> dict[str, Tensor]:
            return {n: t for n, t in expected().items() if n.startswith("model/")}

        counts[outcome(load, expected)] += 1
        counts[outcome(export, weights)] += 1
    assert counts["refused"] > CASES // 3
    if signed and name != "manifest.json":
        assert counts["loaded"], "nothing was let through: what is tested is not the reading"
