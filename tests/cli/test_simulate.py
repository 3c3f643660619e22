"""`shardwise simulate`: a document for what can be, one line for what cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise import cli

WORKLOAD = "gpt:layers=2,hidden=64,heads=4,sequence=32,vocabulary=256,batch_size=16"


def test_document(capsys: pytest.CaptureFixture[str]) -> None:
    strategies = [f"--strategy={strategy}" for strategy in ("dp=8", "tp=2,pp=2", "dp=3")]
    assert cli.main(["simulate", WORKLOAD, "--cluster", "h100x8", *strategies, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in document["candidates"]] == ["dp=8", "tp=2,pp=2"]
    assert document["best"] in ("dp=8", "tp=2,pp=2")
    assert document["rejected"][0]["strategy"] == "dp=3"
    first = document["candidates"][0]
    parts = ("compute", "exposed_communication", "bubble", "optimizer", "host")
    assert sum(first[f"{part}_seconds"] for part in parts) == pytest.approx(first["step_seconds"], rel=1e-6)
    assert first["alpha"] == pytest.approx(first["communication_seconds"] / first["compute_seconds"])


@pytest.mark.parametrize(
    ("cluster", "strategy", "message"),
    [
        ("h1000x8", "dp=8", "h1000"),
        ("h100x8", "dp=16", "needs 16 devices, h100x8 has 8"),
        ("h100x8", "dp=3", "does not divide"),
    ],
)
def test_wrong_requests(capsys: pytest.CaptureFixture[str], cluster: str, strategy: str, message: str) -> None:
    assert cli.main(["simulate", WORKLOAD, "--cluster", cluster, "--strategy", strategy]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    strategies = ["--strategy=dp=8", "--strategy=tp=2,pp=2"]
    command = ["simulate", WORKLOAD, "--cluster", "h100x8", *strategies, "--trace", str(out), "--slow", "1=2"]
    assert cli.main([*command, "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["candidates"]
    events = json.loads(out.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [
        "dp=8: rank 0 on NVIDIA H100 SXM5 80GB",
        "dp=8: rank 1 on NVIDIA H100 SXM5 80GB, 2 times as slow",
        "tp=2,pp=2: rank 0, stage 0 on NVIDIA H100 SXM5 80GB, 2 times as slow",
        "tp=2,pp=2: rank 2, stage 1 on NVIDIA H100 SXM5 80GB",
    ]
    for number, row in enumerate(rows):
        pids = {0, 1} if number == 0 else {2, 3}
        last = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X" and event["pid"] in pids)
        assert last == pytest.approx(row["step_seconds"] * 1e6)


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    strategies = [f"--strategy={strategy}" for strategy in ("dp=4,tp=2", "tp=2,pp=2")]
    command = ["simulate", WORKLOAD, "--cluster", "h100x8", *strategies, "--dry-run", "--quiet"]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["candidates"]
    for row in rows:
        run = row["dry_run"]
        assert run["bytes_agree"]
        assert run["communicated"] == run["predicted"]["communicated"]
        tensors = row["memory_bytes"] - row["memory"]["fragments"] - row["memory"]["context"]
        assert run["predicted"]["memory_bytes"] == tensors
        assert run["memory_error"] == pytest.approx(abs(tensors / run["memory_bytes"] - 1))
        assert sum(run["memory"].values()) == run["memory_bytes"]
        assert run["flops"] > 0
        assert run["closed_form_seconds"] == row["step_seconds"]
        assert max(map(abs, run["time_errors"].values())) <= 0.05
        assert run["time_errors"]["timeline"] == run["timeline_seconds"] / run["step_seconds"] - 1
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "memory predicted" in said
    assert said.count("alike") == 2
    assert "step: closed form" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slow", "8=2"], "has ranks 0 to 7: there is no rank 8"),
        (["--slow", "0=0.5"], "slow=0=0.5: how many times as long it computes is a number of 1 or more"),
        (["--slow=-1=2"], "slow=-1=2: a rank is 0 or more"),
        (["--trace", "."], "trace=.: is a folder, give a file"),
        (["--trace", "nowhere/trace.json"], "trace=nowhere/trace.json: there is no folder nowhere"),
    ],
)
def test_wrong_traces(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["simulate", WORKLOAD, "--cluster", "h100x8", "--strategy", "dp=8", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
