"""Standing: published runs predicted for their own software and for Shardwise, by one model of cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise import cli
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.published.row import PublishedRun, read
from shardwise.predict.published.standing import standing, standings, strategy_of, workload_of

HEADER = "group,model,layers,hidden,heads,ffn,vocab,seq_len,gpu,n_gpus,tp,pp,cp,micro_batch,global_batch,precision"
ROW = "mine,GPT-small,4,512,8,2048,8192,256,A100-80GB,4,2,1,1,2,16,bf16"


def run(recompute: str = "none", **changes: str) -> PublishedRun:
    cells = dict(zip(HEADER.split(","), ROW.split(","), strict=True)) | {"recompute": recompute, **changes}
    return read({**cells, "step_time_s": "0.1"}, 2)


def test_the_model_is_as_large_and_the_strategy_the_same() -> None:
    found = run()
    parameters = sum(each.numel() for each in workload_of(found).model().parameters())
    assert parameters == pytest.approx(found.sizes.parameters, rel=0.05)
    assert str(found.strategy) == "dp=2,tp=2,sp=1,microbatches=4"
    assert str(strategy_of(found)) == f"{found.strategy},compile=1"
    assert str(strategy_of(run("full")).recompute) == "full"
    assert str(strategy_of(run("selective op")).recompute) == "selective"
    assert str(strategy_of(run("selective layer")).recompute) == "1/2"
    assert str(strategy_of(run("selective")).recompute) == "none"  # attention keeps no scores


def test_a_run_is_predicted_for_both() -> None:
    found = run()
    own = costs_of(found.profile, found.strategy, found.cluster).prediction()
    document = standing(found, own).document()
    assert document["predicted_seconds"] == own.step_seconds
    assert document["ratio"] == document["shardwise_seconds"] / own.step_seconds
    assert 0.5 < document["ratio"] < 3


def test_what_shardwise_cannot_run_is_said() -> None:
    found = run(tp="1", cp="2")
    own = costs_of(found.profile, found.strategy, found.cluster).prediction()
    document = standing(found, own).document()
    assert document["shardwise_seconds"] is None
    assert document["reason"].startswith("context parallelism")


def test_few_rows_of_a_group_are_looked_at() -> None:
    found = run(tp="1", cp="2")
    own = costs_of(found.profile, found.strategy, found.cluster).prediction()
    assert len(standings([(found, own)] * 12)) == 4


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, page = tmp_path / "runs.csv", tmp_path / "standing.md"
    table.write_text(f"{HEADER},step_time_s\n{ROW},0.1\n")
    assert cli.main(["validate", str(table), "--standing", str(page), "--json", "--quiet"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["standing"]
    text = page.read_text()
    assert text.startswith("# Shardwise beside other software\n")
    assert f"| {row['ratio']:.2f} |" in text
    assert cli.main(["validate", str(table), "--standing", str(tmp_path / "no" / "page.md"), "--quiet"]) == 2
    assert "--standing" in capsys.readouterr().err
