"""Wrong requests: one line, exit status 2, and no worker starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli import main


@pytest.fixture(autouse=True)
def _no_worker_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("shardwise.run.training.execute.run_local", refuse)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    description: dict[str, Any] = {
        "workload": "other",
        "source": None,
        "settings": {},
        "seed": 0,
        "strategy": "single",
    }
    (folder / "other" / "run.json").write_text(json.dumps({**description, "steps": None, "epochs": 1}))
    (folder / "torn").mkdir()
    (folder / "torn" / "run.json").write_text('{"workload": "small"')
    shutil.copytree(folder / "other", folder / "lost")
    lost = {**description, "steps": None, "epochs": 1, "first_checkpoint": 4}
    (folder / "lost" / "run.json").write_text(json.dumps(lost))
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy dp=2 --workers 3", "strategy dp=2 needs 2 workers, there are 3: use --workers 2, or degrees"),
        ("--strategy dpp=2", "unknown axis 'dpp' in strategy 'dpp=2'"),
        (
            "--strategy pp=2,schedule=gpip",
            "schedule=gpip: known are gpipe, 1f1b, interleaved, zero-bubble, pipedream; did you mean",
        ),
        ("--strategy dp=3", "batch_size=8 does not divide by the 3 replicas of dp=3: use batch_size=6 or 9"),
        ("--workers 0", "workers=0: must be 1 or more"),
        ("--steps 0", "steps=0: must be 1 or more"),
        ("--keep 0", "keep=0: must be 1 or more"),
        ("--set bach_size=4", "did you mean 'batch_size'?"),
        ("--set samples=0", "the dataset of workload 'small' is empty"),
        ("--out other", "other holds another run: use --resume to go on with it, or another --out"),
        ("--out full", "full is not empty"),
        ("--out work.py", "work.py is a file"),
        ("--out empty --resume", "empty holds no run to resume"),
        ("--out missing --resume", "missing holds no run to resume"),
        ("--out torn --resume", "torn/run.json is not the description of a run"),
        ("--out lost --resume", "lost has lost its checkpoints: lost/checkpoints holds none; put them back, or begin"),
        ("--resume", "holds no run of workload 'work.py:small' to resume"),
        ("--out other --resume", "other holds a run of workload 'other', not 'small'"),
    ],
)
def test_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "work.py:small", *arguments.split()]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert message in errors
    assert errors.startswith("shardwise: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "workload", ["imgae", "work.py:smal", "work.py:broken", "work.py:nothing", "no/file.py:x", "no_such_module:x"]
)
def test_a_workload_that_cannot_be_imported(workload: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", workload]) == 2
    errors = capsys.readouterr().err
    assert workload.rpartition(":")[0] in errors or workload in errors
    assert errors.count("\n") == 1


def test_compare_refuses_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "work.py:small", "--strategy", "single", "--strategy", "dp=3"]) == 2
    assert "does not divide by the 3 replicas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan", "plan: give a workload to plan for (image, gpt:layers=24, ...), or --check FILE"),
        (
            "plan image --check p.toml --workers 2 --fix tp=2",
            "--check p.toml is of that plan alone: leave out --workers, --fix",
        ),
        ("plan image --cluster h100x4 --fix tp=4 --fix tp=2", "--fix tp=4 and --fix tp=2 contradict each other"),
        (
            "simulate image --cluster h100x2 --strategy dp=2 --set batch_size=8 --set batch_size=4",
            "--set batch_size=8 and --set batch_size=4 contradict each other",
        ),
        (
            "simulate image --cluster h100x2 --strategy dp=2 --slow 1=2 --slow 1=3",
            "--slow 1=2.0 and --slow 1=3.0 contradict each other",
        ),
        (
            "simulate gpt:layers=1,hidden=64,heads=2,precision=bf16 --cluster v100x8 --strategy dp=8",
            "V100 SXM2 32GB has no rate for bf16; it has rates for float32, float64, fp16: use precision=float32",
        ),
    ],
)
def test_predictions(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert message in errors
    assert errors.count("\n") == 1


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 64, "intermediate_size": 96}
CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            {**LLAMA, **SMALL, "hidden_size": -64},
            "batch_size=8",
            "LlamaForCausalLM cannot be built of it: RuntimeError",
        ),
        (
            {**BERT, **SMALL, "max_position_embeddings": 64},
            "sequence=65",
            "BertForMaskedLM has 64 positions (max_position_embeddings in hf/config.json): use sequence=64",
        ),
        (CODE, "batch_size=8", "hf/config.json names code of its own (auto_map), which is not run"),
    ],
)
def test_configurations(
    config: dict[str, object], settings: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    (folder / "hf" / "own.py").write_text("raise AssertionError('code of a folder was run')")
    command = ["simulate", "hf", "--cluster", "h100x2", "--strategy", "dp=2", "--set", settings, "--quiet"]
    assert main(command) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert message in errors
    assert errors.count("\n") == 1


def test_computed_positions_have_no_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({**LLAMA, **SMALL, "max_position_embeddings": 64}))
    command = ["simulate", "hf", "--cluster", "h100x2", "--strategy", "dp=2", "--set", "sequence=96", "--quiet"]
    assert main(command) == 0
    assert "fits" in capsys.readouterr().out


def test_one_strategy_that_cannot_be_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    strategies = ["--strategy=dp=8", "--strategy=dp=8,precision=float32"]
    workload = "gpt:layers=1,hidden=64,heads=2,precision=bf16"
    assert main(["simulate", workload, "--cluster", "v100x8", *strategies, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in document["candidates"]] == ["dp=8,precision=float32"]
    assert "no rate for bf16" in document["rejected"][0]["reason"]


def test_export_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "empty", "model.safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian work.py:small", "; did you mean 'train'?"),
        ("train work.py:small --world-size 2", "unknown option '--world-size'"),
        ("train work.py:small --worker 2", "unknown option '--worker'; did you mean '--workers'?"),
        ("train work.py:small --workers two", "'two' is not a whole number"),
        ("train work.py:small --set depth", "'depth' is not of the form key=value"),
        ("train work.py:small --steps 3 --epochs 2", "not allowed with"),
        ("train work.py:small more", "unknown argument 'more'"),
        ("train", "shardwise train: WORKLOAD is missing: image, language, medical, file.py:function"),
        ("verify work.py:small", "shardwise verify: --strategy is missing: one to verify"),
        ("simulate", "shardwise simulate: WORKLOAD, --cluster and --strategy are missing; shardwise simulate --help"),
        ("train work.py:small --steps", "--steps: expected one argument; shardwise train --help says more"),
        ("train work.py:small --steps 1_000", "'1_000' is not a whole number"),
        ("", "no command: known are train, "),
    ],
)
def test_misuse(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("shardwise")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys, shardwise.cli
try: shardwise.cli.main({arguments})
except SystemExit as end: assert not end.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
