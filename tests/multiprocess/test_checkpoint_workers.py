"""Checkpoints of several workers: any way to split is read by any other."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import Pools
from safetensors.torch import load_file
from standin import Split, StandIn, adam_like, whole
from torch import Tensor

from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.parallel.state.layout import Layout
from shardwise.run.checkpoint import folder, reader, writer
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.checkpoint.export import export_safetensors

Held = tuple[Layout, bool] | None


def replicated(rank: int, ranks: int, name: str, shape: tuple[int, ...]) -> Held:
    return Layout.whole(shape), rank == 0


def rows(rank: int, ranks: int, name: str, shape: tuple[int, ...]) -> Held:
    """Split rows as `fully_shard` does: the last workers may hold none."""
    if not shape:
        return replicated(rank, ranks, name, shape)
    size = -(-shape[0] // ranks)
    start = min(rank * size, shape[0])
    return Layout.whole(shape).rows(start, min(start + size, shape[0])), True


def heads(rank: int, ranks: int, name: str, shape: tuple[int, ...]) -> Held:
    """Split as tensor parallelism does: the fused projection by its three spans, the next weight by columns."""
    if shape == (24, 6):
        return Layout.split(shape, 0, (8, 8, 8), rank, ranks), True
    if shape == (6, 8):
        return Layout.split(shape, 1, (8,), rank, ranks), True
    return replicated(rank, ranks, name, shape)


def stages(rank: int, ranks: int, name: str, shape: tuple[int, ...]) -> Held:
    owner = sum(map(ord, name.split("/")[1])) % ranks
    return (Layout.whole(shape), True) if owner == rank else None


def pairs(rank: int, ranks: int, name: str, shape: tuple[int, ...]) -> Held:
    """Two replicas of two tensor shards."""
    held = heads(rank % 2, 2, name, shape)
    assert held is not None
    return held[0], held[1] and rank < 2


def here(split: Any) -> Split:
    return lambda name, shape: split(dist.get_rank(), dist.get_world_size(), name, shape)


def save(run: Path, split: Any, step: int = 6) -> None:
    checkpoints = Checkpoints(run)
    checkpoints.save(StandIn(*adam_like(step), split=here(split), steps=step), {"epoch": 2})
    checkpoints.wait()


def zeros(split: Split) -> StandIn:
    return StandIn({name: torch.zeros_like(tensor) for name, tensor in adam_like()[0].items()}, split=split)


def check_load(run: Path, split: Split) -> None:
    checkpoints, program = Checkpoints(run), zeros(split)
    path = checkpoints.latest()
    assert path is not None
    assert checkpoints.load(program, path) == {"epoch": 2}
    expected = StandIn(*adam_like(6), split=split).locals()
    assert program.locals().keys() == expected.keys()
    for name, tensor in expected.items():
        assert program.locals()[name].dtype == tensor.dtype
        assert torch.equal(program.locals()[name], tensor), name


def check_loads(run: Path, splits: list[Any]) -> None:
    for split in splits:
        check_load(run, here(split))


SPLITS = [(2, replicated), (2, rows), (2, heads), (4, rows), (4, stages), (4, pairs)]


@pytest.mark.parametrize(("count", "split"), SPLITS)
def test_any_split_is_read_by_any_other(workers: Pools, tmp_path: Path, count: int, split: Any) -> None:
    workers(count, save, tmp_path, split)
    check_load(tmp_path, whole)
    for other_count in (2, 4):
        workers(other_count, check_loads, tmp_path, [other for n, other in SPLITS if n == other_count])
    export_safetensors(tmp_path, tmp_path / "out.safetensors")
    exported = load_file(tmp_path / "out.safetensors")
    assert exported.keys() == adam_like(6)[0].keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in adam_like(6)[0].items())


def test_replicas_write_each_tensor_once(workers: Pools, tmp_path: Path) -> None:
    workers(4, save, tmp_path, pairs)
    (found,) = (tmp_path / "checkpoints").iterdir()
    names = sorted(path.name for path in found.glob("*.safetensors"))
    assert names == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_writing_does_not_mix_with_the_collectives_of_the_training(workers: Pools, tmp_path: Path) -> None:
    def train() -> list[float]:
        checkpoints, sums = Checkpoints(tmp_path), []
        program = StandIn(*adam_like(6), split=here(rows))
        for step in range(40):
            program.steps = step
            if step % 8 == 0:
                checkpoints.save(program, {"epoch": 2})
            total = torch.tensor(float(dist.get_rank() + step))
            dist.all_reduce(total)
            sums.append(total.item())
        checkpoints.wait()
        return sums

    assert workers(2, train) == [[2.0 * step + 1 for step in range(40)]] * 2
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (16, 24, 32)
    ]
    check_load(tmp_path, whole)


def test_write_that_fails_on_one_worker_fails_on_all(workers: Pools, tmp_path: Path) -> None:
    def fail() -> str:
        broken = mock.patch.object(writer, "write_tensors", _no_space)
        try:
            with broken if dist.get_rank() == 1 else nullcontext():
                save(tmp_path, rows)
        except ShardwiseError as error:
            return str(error)
        return ""

    messages = workers(2, fail)
    assert messages[0] == messages[1]
    assert "could not be written by worker 1: [Errno 28] No space left on device" in messages[0]
    assert Checkpoints(tmp_path).latest() is None
    workers(2, save, tmp_path, rows)
    check_load(tmp_path, whole)


def _no_space(*args: Any) -> Any:
    time.sleep(0.05)
    raise OSError(28, "No space left on device")


def test_other_model_on_one_worker_is_refused_on_all(workers: Pools, tmp_path: Path) -> None:
    workers(2, save, tmp_path, rows)

    def load(wrong: dict[str, Tensor | None]) -> tuple[str, bool]:
        model = {name: torch.zeros_like(tensor) for name, tensor in adam_like()[0].items()}
        if dist.get_rank() == 1:
            model |= {name: tensor for name, tensor in wrong.items() if tensor is not None}
        model = {name: tensor for name, tensor in model.items() if wrong.get(name, tensor) is not None}
        program, checkpoints = StandIn(model, split=here(rows)), Checkpoints(tmp_path)
        path = checkpoints.latest()
        assert path is not None
        with pytest.raises(CheckpointError) as info:
            checkpoints.load(program, path)
        return str(info.value), not any(bool(tensor.any()) for tensor in program.locals().values())

    for wrong, message in [
        ({"odd": torch.zeros(4, dtype=torch.int8)}, "odd has shape (3,) there and (4,) here"),
        ({"more": torch.zeros(2)}, "it has no more, here of shape (2,)"),
        ({"mask": None}, "it has mask of shape (5, 3), which is not here"),
    ]:
        first, second = workers(2, load, wrong)
        assert first == second
        assert message in first[0]
        assert first[1], "something was changed"


def test_only_what_is_held_is_read(workers: Pools, tmp_path: Path) -> None:
    workers(4, save, tmp_path, rows)

    def elements_read() -> tuple[int, int]:
        kept, elements = reader.read_slice, [0]

        def counted(*args: Any) -> Tensor:
            tensor = kept(*args)
            elements[0] += tensor.numel()
            return tensor

        program, checkpoints = zeros(here(heads)), Checkpoints(tmp_path)
        path = checkpoints.latest()
        assert path is not None
        with mock.patch.object(reader, "read_slice", counted):
            checkpoints.load(program, path)
        return elements[0], sum(tensor.numel() for tensor in program.locals().values())

    for read, held in workers(2, elements_read):
        assert read == held


def test_folder_that_not_all_workers_see(workers: Pools, tmp_path: Path) -> None:
    def fail() -> str:
        with pytest.raises(ShardwiseError) as info:
            save(tmp_path / str(dist.get_rank()), rows)
        return str(info.value)

    (tmp_path / "1" / "checkpoints" / ".step-00000006.partial").mkdir(parents=True)
    for message in workers(2, fail):
        assert "rank-00001.safetensors is not to be seen there: all workers must share the file system" in message


def test_damage_is_found_by_whichever_worker_reads_the_file(workers: Pools, tmp_path: Path) -> None:
    workers(4, save, tmp_path, rows)
    (found,) = (tmp_path / "checkpoints").iterdir()
    path = found / "rank-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    def load() -> str:
        with pytest.raises(CheckpointError) as info:
            Checkpoints(tmp_path).load(zeros(here(rows)), found)
        return str(info.value)

    for message in workers(2, load):
        assert message == f"checkpoint {found} is damaged: the checksum of rank-00002.safetensors is wrong"
    assert workers(2, warnings_of_latest, tmp_path) == [(0, "no checkpoint"), (0, "no checkpoint")]
    workers(2, save, tmp_path, rows, 5)
    assert workers(2, warnings_of_latest, tmp_path) == [(1, "step-00000005"), (0, "step-00000005")]


def warnings_of_latest(run: Path) -> tuple[int, str]:
    """(lines warned here, the checkpoint that is found or the beginning of what is raised)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    folder.logger.addHandler(handler)
    try:
        path = Checkpoints(run).latest()
    except CheckpointError as error:
        return 0, str(error)[:13]
    finally:
        folder.logger.removeHandler(handler)
    assert path is not None
    return len(lines), path.name


def test_failed_write_is_told_on_all_workers_before_the_same_step(workers: Pools, tmp_path: Path) -> None:
    def train() -> tuple[int, str]:
        checkpoints = Checkpoints(tmp_path)

        def full(*args: Any) -> Any:
            time.sleep(0.05)
            raise OSError(28, "No space left on device")

        broken = mock.patch.object(writer, "write_tensors", full)
        step = 0
        with broken if dist.get_rank() == 1 else nullcontext():
            checkpoints.save(StandIn(*adam_like(7), split=here(rows), steps=7), {})
            try:
                while step < 10**6:
                    checkpoints.poll()
                    dist.all_reduce(torch.ones(8))
                    step += 1
            except ShardwiseError as error:
                return step, str(error)
        raise AssertionError("nothing was told")

    (first, line), (second, same) = workers(2, train)
    assert first == second
    assert line == same
    assert "step-00000007 could not be written by worker 1: [Errno 28] No space left on device" in line
    workers(2, save, tmp_path, rows)
    check_load(tmp_path, whole)


def test_worker_killed_while_it_writes(workers: Pools, tmp_path: Path) -> None:
    workers(2, save, tmp_path, rows)

    def die() -> None:
        def killed(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoints = Checkpoints(tmp_path)
        deadly = mock.patch.object(writer, "write_tensors", killed)
        with deadly if dist.get_rank() == 1 else nullcontext():
            checkpoints.save(StandIn(*adam_like(7), split=here(rows), steps=7), {})
            checkpoints.wait()

    with pytest.raises(Exception, match=r"worker 1 died|[Cc]onnection"):
        workers(2, die)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".step-00000007.partial",
        "step-00000006",
    ]
    check_load(tmp_path, whole)
    workers(2, save, tmp_path, heads)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
