"""`shardwise simulate`: a document for what can be, one line for what cannot."""

from __future__ import annotations

import json

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
