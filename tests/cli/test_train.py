from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm
from command import BOX, Run, command, processes_with
from full_disk import full_disk  # noqa: F401 - a fixture
from safetensors import safe_open


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return {record["step"]: record["loss"] for record in steps}


def document(output: str) -> dict[str, Any]:
    assert output.count("\n") == 1
    result: dict[str, Any] = json.loads(output)
    return result


def test_train_and_resume(run: Run, folder: Path) -> None:
    # 28 samples in batches of 8: an epoch has 4 steps, the last of 4 samples
    done = run("train", "work.py:small", "--strategy", "dp=2", "--steps", "6", "--out", "whole", "--json")
    whole = document(done.stdout)
    assert whole["strategy"] == "dp=2"
    assert (whole["steps"], whole["workers"], whole["run"]) == (6, 2, "whole")
    assert whole["transport"] == "shm"
    assert {"loss", "accuracy"} == set(whole["metrics"])
    assert all(whole[key] > 0 for key in ("loss", "samples_per_second", "step_seconds", "alpha", "memory_bytes"))
    assert whole["first_step"]["proved"]
    assert whole["first_step"]["gradient_error"] < 1e-5
    assert "first step equals one process: loss" in done.stderr
    assert whole["predicted_seconds"] is None
    assert whole["reasons"]["predicted_seconds"] == "this machine is not measured: SHARDWISE_CLUSTER=off"
    assert "6/6" in done.stderr  # the progress bar
    summary = json.loads((folder / "whole/summary.json").read_text())
    assert summary | {"report": "whole/report.html"} == whole
    expected = losses(folder / "whole")
    assert expected[6] == whole["loss"]

    run("train", "work.py:small", "--workers", "2", "--steps", "3", "--out", "part", "--quiet")
    for strategy, exact in (("dp=2", True), ("fsdp=2", False)):
        out = f"part-{strategy}"
        shutil.copytree(folder / "part", folder / out)
        done = run(
            "train", "work.py:small", "--strategy", strategy, "--steps", "6", "--out", out, "--resume", "--quiet"
        )
        assert done.stdout.startswith(f"small under {strategy}: 6 steps")
        assert done.stderr == ""
        assert losses(folder / out) == (expected if exact else pytest.approx(expected, rel=1e-5))

    run("export", "part-fsdp=2", "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(run: Run, folder: Path) -> None:
    run("train", "work.py:small", "--steps", "6", "--checkpoint-every", "2", "--keep", "2", "--seed", "5")
    (only,) = (folder / "runs").iterdir()
    assert only.name == "small-single-1"
    expected = losses(only)
    assert [path.name for path in sorted((only / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    shutil.rmtree(only / "checkpoints/step-00000006")  # as if it had been killed after step 5, while writing a line
    lines = (only / "metrics.jsonl").read_text().splitlines(keepends=True)
    (only / "metrics.jsonl").write_text("".join(lines[:-2]) + '{"step": 6, "lo')
    run("train", "work.py:small", "--resume")  # the newest run of this workload, as it was asked for then
    assert losses(only) == expected
    assert json.loads((only / "run.json").read_text())["resumes"]
    done = run("train", "work.py:small", "--resume", "--steps", "2")  # it has more already
    assert done.stdout.startswith("small under single: 6 steps on 1 worker\n  loss ")
    assert losses(only) == expected


def test_one_at_a_time_in_a_folder(run: Run, folder: Path, mark: str) -> None:
    options = ("work.py:small", "--strategy", "single", "--out", "out", "--quiet", "--checkpoint-every", "1")
    first = warm.Started(command("train", *options, "--set", "fail=wait"), stderr=subprocess.PIPE)
    assert first.stderr is not None
    try:
        while "waiting" not in first.stderr.readline():
            assert first.poll() is None
        second = run("train", *options, "--resume", "--set", "fail=", status=2)
        assert second.stdout == ""
        line = (
            f"shardwise: out is in use: process {first.pid} trains in it; wait until it has ended, or use another --out"
        )
        assert second.stderr.splitlines() == [line]
        run("export", "out", "model.safetensors")
    finally:
        first.kill()
        first.communicate()
    assert processes_with(mark) == []
    run("train", *options, "--resume", "--set", "fail=")
    assert list(losses(folder / "out")) == [1, 2, 3, 4]


def test_full_disk(run: Run, folder: Path, full_disk: Path) -> None:  # noqa: F811
    options = ("work.py:small", "--strategy", "dp=2", "--out", str(full_disk / "run"))
    done = run("train", *options, "--epochs", "100", "--set", "hidden=4000", status=1)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("shardwise: ")
    assert "No space left on device" in last


def test_under_torchrun(run: Run, folder: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = run("train", "work.py:small", "--steps", "3", "--json", "--quiet", launcher=launcher)
    result = document(done.stdout)  # of rank 0 alone
    assert result["strategy"] == "dp=2"
    assert losses(folder / result["run"])[3] == result["loss"]


def test_compare(run: Run) -> None:
    strategies = ("--strategy", "single", "--strategy", "dp=2")
    done = run("compare", "work.py:small", *strategies, "--epochs", "2", "--json")
    result = document(done.stdout)
    assert result["workload"] == "small"
    assert result["workers"] == 2
    single, dp = result["results"]
    assert (single["strategy"], dp["strategy"]) == ("single", "dp=2")
    assert single["speedup"] == 1
    assert single["loss_difference"] == 0
    assert single["alpha"] == 0
    assert 0 < dp["loss_difference"] < 1e-5 or dp["loss_difference"] == 0
    assert dp["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert 0 < dp["communication_share"] < 1
    assert result["fastest"] in ("single", "dp=2")
    assert result["chosen"] is None
    assert result["reasons"]["chosen"]
    table = [line for line in done.stderr.splitlines() if line.startswith(("strategy ", "single  ", "dp=2  "))]
    assert [line.split()[0] for line in table] == ["strategy", "single", "dp=2"]


def test_where_nothing_is_given_it_is_planned(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "box.toml").write_text(BOX)
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(folder / "box.toml"))
    trained = document(run("train", "work.py:small", "--steps", "2", "--json", "--quiet").stdout)
    assert "Chosen: " in trained["explanation"]
    strategies = ("--strategy", "single", "--strategy", "auto")
    compared = document(run("compare", "work.py:small", *strategies, "--steps", "2", "--json", "--quiet").stdout)
    assert compared["auto"] == trained["strategy"]
    assert compared["auto"] in [row["strategy"] for row in compared["results"]]
