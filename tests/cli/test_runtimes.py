"""`--runtime`: a plan for the software that one has, with the settings that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import BOX

from shardwise import api, cli
from shardwise.workload.load import load_workload

SPEC = "gpt:layers=4,hidden=64,heads=4,sequence=32,vocabulary=256,batch_size=8"


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--json", "--quiet"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("runtime", "program", "files"),
    [
        ("megatron", "pretrain_gpt.py", []),
        ("torchtitan", "torchtitan.train", ["torchtitan.toml", "flavor.py"]),
        ("deepspeed", "deepspeed", ["ds_config.json"]),
        ("accelerate", "accelerate", ["accelerate.yaml"]),
        ("shardwise", "gpt:layers=4,hidden=64,heads=4,sequence=32,vocabulary=256,batch_size=8", []),
    ],
)
def test_plan(capsys: pytest.CaptureFixture[str], runtime: str, program: str, files: list[str]) -> None:
    found = document(capsys, "plan", SPEC, "--cluster", "h100x4", "--runtime", runtime, "--fix", "microbatches=1")
    assert (found["runtime"], found["launch"]["runtime"]) == (runtime, runtime)
    assert program in found["launch"]["arguments"]
    assert list(found["launch"]["files"]) == files


def test_the_text_says_whose_program_it_prices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", SPEC, "--cluster", "h100x4", "--runtime", "deepspeed"]) == 0
    said = capsys.readouterr().out
    assert "on 4 devices of h100x4, in bf16, trained by deepspeed: " in said
    assert "Predicted is DeepSpeed's program, not Shardwise's." in said
    assert "\n    {\n" in said
    assert "deepspeed --num_nodes 1 --num_gpus 4 train.py --deepspeed_config ds_config.json" in said


def test_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", SPEC, "--cluster", "h100x4", "--runtime", "megatron", "--strategy", "dp=4"]
    found = document(capsys, *arguments, "--strategy", "fsdp=4")
    assert [each["strategy"] for each in found["candidates"]] == ["dp=4"]
    assert "--overlap-grad-reduce" in found["candidates"][0]["launch"]["arguments"]
    assert "Megatron-LM has zero=1, not zero=3" in found["rejected"][0]["reason"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "on h100x4, trained by megatron" in said
    assert "torchrun --nnodes 1 --nproc-per-node 4 pretrain_gpt.py" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--runtime", "megatorn"], "did you mean 'megatron'?"),
        (["--runtime", "megatron", "--out", "plan.toml"], "--out is of Shardwise's own program, not of Megatron-LM"),
        (["--runtime", "accelerate", "--dry-run"], "--dry-run is of Shardwise's own program, not of accelerate"),
        (["--runtime", "megatron", "--fix", "zero=3"], "Megatron-LM has zero=1, not zero=3"),
        (["--runtime", "deepspeed", "--fix", "pp=2"], "DeepSpeed has pp=1, not pp=2"),
        (["--runtime", "torchtitan", "--set", "tied=true"], "embedding and output share their matrix"),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", SPEC, "--cluster", "h100x4", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--trace", "step.json"], ["--slow", "0=2"], ["--dry-run"]])
def test_what_only_shardwise_can_show(capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    wanted = ["simulate", SPEC, "--cluster", "h100x4", "--strategy", "dp=4", "--runtime", "torchtitan", *option]
    assert cli.main(wanted) == 2
    assert f"{option[0]} is of Shardwise's own program, not of torchtitan" in capsys.readouterr().err


def test_a_cluster_of_cpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text(BOX, encoding="utf-8")
    wanted = ["plan", SPEC, "--cluster", str(tmp_path / "box.toml"), "--runtime", "accelerate"]
    assert cli.main(wanted) == 2
    assert "runtime=accelerate: predicted on GPUs alone, box has CPUs" in capsys.readouterr().err


def test_a_workload_as_an_object() -> None:
    found = api.plan(load_workload(SPEC, {}), cluster="h100x4", fix=["tp=2"], runtime="megatron")
    assert "pretrain_gpt.py" in found["launch"]["arguments"]
