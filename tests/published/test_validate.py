"""Predictions against runs that others measured: errors stay below what was reached, and wrong rows are told."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardwise import cli
from shardwise.cluster.cluster import ORIGINS
from shardwise.errors import DataError
from shardwise.predict.hardware.constants import constants, using
from shardwise.predict.published.statistics import percentile, rank_correlation, rank_correlation_of_scatter
from shardwise.predict.published.validate import validate

RUNS = Path(__file__).with_name("runs.csv")
DOCS = Path(__file__).parents[2] / "docs"

REACHED = {
    "vTrain single node": 0.075,
    "vTrain multi": 0.1,
    "BLOOM prequel": 0.075,
    "SC21": 0.04,
    "llm-foundry A100-80GB": 0.05,
    "llm-foundry H100-80GB": 0.06,
    "torchtitan": 0.095,
    "Megatron 2020": 0.07,
    "Korthikanti": 0.08,
    "Sailor GH200": 0.125,
}
"""Mean error by group that must not be exceeded: what was reached, and some slack."""


MEMORY = {"torchtitan": 0.075, "BLOOM prequel": 0.06, "nanotron": 0.07, "Sailor GH200": 0.07}
"""Compute these errors for peak memory."""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return validate(RUNS)


def test_all_rows_are_predicted(document: dict[str, Any]) -> None:
    assert (document["rows"], document["skipped"]) == (1101, 0)


def test_mean_over_groups(document: dict[str, Any]) -> None:
    assert document["mean_of_groups"] < 0.08


@pytest.mark.parametrize("group", REACHED)
def test_group(document: dict[str, Any], group: str) -> None:
    assert document["groups"][group]["mean_error"] < REACHED[group]


def test_no_group_is_far_off(document: dict[str, Any]) -> None:
    assert {name for name, group in document["groups"].items() if group["mean_error"] > 0.125} == set()


@pytest.mark.parametrize("group", MEMORY)
def test_memory(document: dict[str, Any], group: str) -> None:
    assert document["groups"][group]["memory_mean_error"] < MEMORY[group]


def test_single_node_is_ranked(document: dict[str, Any]) -> None:
    assert document["groups"]["vTrain single node"]["rank_correlation"] > 0.98


@pytest.mark.parametrize("group", ["vTrain single node", "vTrain multi", "BLOOM prequel", "Sailor GH200"])
def test_the_fastest_is_among_the_first_three(document: dict[str, Any], group: str) -> None:
    assert document["groups"][group]["best_is_predicted"] <= 3


def test_constants_are_told(document: dict[str, Any]) -> None:
    for name, entry in document["constants"].items():
        assert entry["origin"] in ORIGINS, name
        assert entry["source"], name


def test_terms_add_up_to_the_step(document: dict[str, Any]) -> None:
    for row in document["worst"]:
        assert sum(row["terms"].values()) == pytest.approx(row["predicted_seconds"], rel=1e-6)


def test_a_wrong_constant_is_noticed(tmp_path: Path) -> None:
    numbers = constants()
    slow = replace(numbers, sustained_ampere=numbers.sustained_ampere / 2)
    path = tmp_path / "runs.csv"
    path.write_text(rows())
    right = validate(path)["groups"]["SC21"]["bias"]
    with using(slow):
        assert validate(path)["groups"]["SC21"]["bias"] > right + 0.5
    assert validate(path)["groups"]["SC21"]["bias"] == right


def rows(**changes: str) -> str:
    with RUNS.open(newline="") as file:
        reader = csv.DictReader(file)
        first = next(reader)
        columns = list(first)
    lines = [columns, [first[c] for c in columns], [{**first, **changes}[c] for c in columns]]
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "H1000"}, "unknown gpu"),
        ({"layers": ""}, "no layers"),
        ({"hidden": "wide"}, "hidden is 'wide', not a number"),
        ({"global_batch": "-8"}, "global_batch is -8, not positive"),
        ({"layers": "12", "pp": "16", "n_gpus": "512"}, "12 layers are too few for the 16 stages of pp x vpp"),
        ({"kv_heads": "7"}, "24 heads do not share 7 kv_heads evenly"),
        ({"target_step_time_s": "", "step_time_s": "", "step_time_s_derived": ""}, "no target_step_time_s"),
    ],
)
def test_rows_that_lack_something_are_skipped(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(rows(**changes))
    document = validate(path)
    assert (document["rows"], document["skipped"]) == (1, 1)
    assert reason in document["skipped_rows"][0]["reason"]
    assert document["skipped_rows"][0]["line"] == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        validate(tmp_path / "missing.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        validate(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no row can be predicted: line 2"):
        validate(tmp_path / "other.csv")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(rows())
    assert cli.main(["validate", str(path), "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["groups"]["SC21"]) >= {"rows", "mean_error", "median_error", "p90_error", "memory_mean_error"}
    assert cli.main(["validate", str(path), "--fail-above", "0"]) == 1
    assert "above 0" in capsys.readouterr().err
    assert cli.main(["validate", str(tmp_path / "missing.csv")]) == 2


def test_the_committed_page_is_what_the_command_writes(tmp_path: Path) -> None:
    page = tmp_path / "accuracy.md"
    assert cli.main(["validate", str(RUNS), "--write", str(page), "--json", "--quiet"]) == 0
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == sorted(file.name for file in DOCS.glob("accuracy*"))
    for name in written:
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), f"{name} is not what validate writes now"


def test_page_in_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(rows())
    assert cli.main(["validate", str(path), "--write", str(tmp_path / "no" / "page.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_page_says_what_was_skipped(tmp_path: Path) -> None:
    path, page = tmp_path / "runs.csv", tmp_path / "page.md"
    path.write_text(rows(global_batch="513"))
    assert cli.main(["validate", str(path), "--write", str(page), "--json", "--quiet"]) == 0
    assert "| 3 | SC21 | global_batch 513 is no whole number of microbatches" in page.read_text()
    assert not (tmp_path / "page-memory.svg").exists()  # no row states its memory


def test_repeated_rows_say_how_measurements_scatter(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(rows(target_step_time_s="7.056"))  # twice the first row's
    group = validate(path)["groups"]["SC21"]
    assert group["repeated_rows"] == 2
    assert group["repeat_largest_deviation"] == pytest.approx(1 / 3)


def test_scatter_bounds_the_rank_correlation() -> None:
    steady = [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0], [5.0, 5.0]]
    assert rank_correlation_of_scatter(steady) == pytest.approx(1)
    noisy = [[value * 0.7, value * 1.4] for value, _ in steady]
    perfect = rank_correlation_of_scatter(noisy)
    assert perfect is not None
    assert 0.7 < perfect < 0.95
    assert rank_correlation_of_scatter(steady[:4]) is None


def test_statistics_by_hand() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.75) == 2.5
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 2], [3, 1, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1], [1, 2]) is None
