"""Files of a run's folder that reports read: what was predicted, and what each worker was busy with."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command import BOX, Run

EXTRAS = ("prediction.json", "ranks.jsonl", "timeline.json", "memory.json")
SLOW = "0.05"


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]


def slowed(run: Run, out: Path, *arguments: str) -> list[list[float]]:
    """Train with workers that sleep; return busy seconds by step and rank, of the steps after the profiled ones.

    The proof of the first step is left out, because its passes count too.
    """
    run("train", "work.py:small", *arguments, "--set", f"slow={SLOW}", "--steps", "25", "--out", str(out), "--no-proof")
    found = lines(out)
    assert [line["step"] for line in found] == list(range(1, 26))
    assert [line["step"] for line in found if line.get("profiled")] == [4, 5]
    assert all(busy <= 1.01 * seconds for line in found for busy, seconds in _pairs(line))
    return [line["busy_seconds"] for line in found[5:]]


def _pairs(line: dict[str, Any]) -> list[tuple[float, float]]:
    return list(zip(line["busy_seconds"], line["seconds"], strict=True))


def late(busy: Sequence[float]) -> bool:
    return max(busy) > 0.8 * float(SLOW)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2"])
def test_one_slow_worker_a_rotating_one_and_a_slow_step_look_different(strategy: str, run: Run, tmp_path: Path) -> None:
    chosen = ("--strategy", strategy, "--set")
    one = slowed(run, tmp_path / "one", *chosen, "when=rank 1")
    assert sum(busy[1] > 2 * busy[0] for busy in one) >= 17

    turn = slowed(run, tmp_path / "turn", *chosen, "when=in turn")
    slowest = [busy.index(max(busy)) for busy in turn]
    assert sum(a != b for a, b in itertools.pairwise(slowest)) >= 16
    assert sum(map(late, turn)) >= 18

    steps = slowed(run, tmp_path / "steps", *chosen, "when=all")
    together = [busy for busy in steps if min(busy) > 0.8 * float(SLOW)]
    assert 4 <= len(together) <= 6, "every fifth step is slow on both workers"
    assert statistics.median(max(busy) for busy in steps) < 0.5 * float(SLOW)


@pytest.mark.parametrize("strategy", ["single", "tp=2", "pp=2"])
def test_all_files_of_a_run(strategy: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "box.toml").write_text(BOX)
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(folder / "box.toml"))
    done = run("train", "work.py:small", "--strategy", strategy, "--steps", "8", "--out", "out", "--quiet", "--json")
    count = json.loads(done.stdout)["workers"]
    out = folder / "out"
    assert {path.name for path in out.iterdir()} >= set(EXTRAS)

    predicted = read(out / "prediction.json")
    assert predicted["candidate"]["step_seconds"] == json.loads(done.stdout)["predicted_seconds"]
    assert predicted["cluster"]["name"] == "box"
    assert predicted["timeline"]
    assert predicted["timeline_left_out"] == 0
    model = predicted["model"]
    named = [each["parameter"] for each in (*model["shards"], *model["whole"])]
    assert sorted(named) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert bool(model["shards"]) == (strategy == "tp=2")
    assert {each["stage"] for each in model["segments"]} == ({0, 1} if strategy == "pp=2" else {0})
    assert sum(each["parameters"] for each in model["segments"]) == (27 if strategy == "tp=2" else 51), "of a worker"

    timeline = read(out / "timeline.json")
    assert timeline["step"] == 5
    assert {row["rank"] for row in timeline["rows"]} == set(range(count))
    assert {"forward", "backward", "optimizer"} <= {row["kind"] for row in timeline["rows"]}
    assert ("waiting" in {row["kind"] for row in timeline["rows"]}) == (count > 1)
    for rank in range(count):
        rows = [row for row in timeline["rows"] if row["rank"] == rank and row["stream"] != "communication"]
        ends = [row["start_seconds"] + row["seconds"] for row in rows]
        assert min(row["start_seconds"] for row in rows) > -0.01
        assert max(ends) - min(row["start_seconds"] for row in rows) < 1.05 * timeline["seconds"][rank] + 0.01

    memory = read(out / "memory.json")["ranks"]
    summary = read(out / "summary.json")
    assert [each["peak_bytes"] for each in memory] == pytest.approx(summary["memory_bytes_by_worker"], rel=0.05)
    parts = ("parameters", "gradients", "optimizer", "rest")
    assert all(sum(each[f"{name}_bytes"] for name in parts) == each["peak_bytes"] for each in memory)
    assert all(each["gradients_bytes"] == each["parameters_bytes"] for each in memory)
    assert all(each["optimizer_bytes"] > 2 * each["parameters_bytes"] - 1 for each in memory)


def test_resume_replaces_what_it_does_again(run: Run, folder: Path) -> None:
    arguments = ("work.py:small", "--out", "out", "--quiet")
    run("train", *arguments, "--strategy", "dp=2", "--steps", "6", "--checkpoint-every", "4")
    ranks = folder / "out" / "ranks.jsonl"
    ranks.write_text(ranks.read_text() + '{"step": 7, "busy_seconds": [9.0, 9.0], "seconds": [9.0, 9.0]}\n{"st')
    run("train", *arguments, "--strategy", "single", "--steps", "12", "--resume")
    found = lines(folder / "out")
    assert [line["step"] for line in found] == list(range(1, 13))
    assert [len(line["seconds"]) for line in found] == [2] * 6 + [1] * 6
    assert read(folder / "out" / "prediction.json")["strategy"] == "single"
    assert len(read(folder / "out" / "memory.json")["ranks"]) == 1


def test_a_crashed_run_leaves_what_there_was(run: Run, folder: Path) -> None:
    arguments = ("--strategy", "dp=2", "--steps", "400", "--set", "samples=4000", "--set", "fail_at=200")
    run("train", "work.py:small", *arguments, "--set", "fail=kill", "--out", "out", "--quiet", status=1)
    found = lines(folder / "out")
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    assert len(found) >= 64
    assert {path.name for path in (folder / "out").iterdir()} >= set(EXTRAS)


def test_under_torchrun(run: Run, folder: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    run("train", "work.py:small", "--strategy", "dp=2", "--steps", "8", "--out", "out", "--quiet", launcher=launcher)
    assert [line["step"] for line in lines(folder / "out")] == list(range(1, 9))
    assert {path.name for path in (folder / "out").iterdir()} >= set(EXTRAS)


def test_what_cannot_be_written_is_told_once_and_ends_nothing(run: Run, folder: Path) -> None:
    def spoiled(name: str) -> None:
        (folder / "out" / name).mkdir()

    run("train", "work.py:small", "--strategy", "dp=2", "--steps", "2", "--out", "out", "--quiet")
    for name in EXTRAS:
        (folder / "out" / name).unlink(missing_ok=True)
        spoiled(name)
    done = run("train", "work.py:small", "--steps", "9", "--out", "out", "--resume", "--quiet")
    told = [line for line in done.stderr.splitlines() if "the run goes on without the files" in line]
    assert len(told) == 1, done.stderr
    assert read(folder / "out" / "summary.json")["steps"] == 9
