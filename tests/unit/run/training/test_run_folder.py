from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
from mutations import mutate_bytes, mutate_document
from standin import StandIn, adam_like

from shardwise.commands.request import TrainingRequest, as_before
from shardwise.errors import RequestError, RunFolderError
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.jsonfile import write_json
from shardwise.run.training import run_folder
from shardwise.run.training.lock import release_lock
from shardwise.run.training.run_folder import (
    check_checkpoints,
    create_run,
    find_run,
    read_run,
    reopen_run,
    write_summary,
)

REQUEST: dict[str, Any] = {
    "workload": "small",
    "source": "work.py:small",
    "settings": {"hidden": "6"},
    "seed": 3,
    "strategy": "dp=2",
    "workers": 2,
    "steps": 30,
    "epochs": None,
}
CASES = 1000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = create_run(tmp_path / "run", REQUEST)
    release_lock(folder)
    return folder


def checkpoint(run: Path) -> None:
    checkpoints = Checkpoints(run)
    checkpoints.save(StandIn(*adam_like(6), steps=6), {})
    checkpoints.wait()


def test_description_comes_back(run: Path) -> None:
    assert {key: read_run(run)[key] for key in REQUEST} == REQUEST
    asked = as_before(TrainingRequest("work.py:small"), run)
    assert (asked.settings, asked.seed, str(asked.strategy), asked.steps) == ({"hidden": "6"}, 3, "dp=2", 30)


def test_damaged_descriptions_are_told_in_one_line(run: Path) -> None:
    path = run / "run.json"
    whole = {**json.loads(path.read_text()), "resumes": [{**REQUEST, "steps": 40}]}
    refused = 0
    for case in range(CASES):
        dice = random.Random(case)
        text = json.dumps(whole).encode()
        path.write_bytes(mutate_document(json.loads(text), dice) if case % 2 else mutate_bytes(text, dice))
        try:
            asked = as_before(TrainingRequest("work.py:small"), run)
        except RequestError as error:
            line = str(error)
        else:
            line = ""
            assert isinstance(asked.seed, int)
            assert isinstance(asked.steps, int | None)
        assert len(line.splitlines()) <= 1, line
        assert len(line) < 1000
        refused += bool(line)
    assert CASES // 3 < refused < CASES


def test_strategy_of_a_description_is_never_a_file(run: Path, tmp_path: Path) -> None:
    plan = tmp_path / "evil.toml"
    plan.write_text("workload = 'os:system'")
    write_json(run / "run.json", {**read_run(run), "strategy": str(plan)})
    with pytest.raises(RequestError, match=r"evil"):
        as_before(TrainingRequest("work.py:small"), run)


@pytest.mark.parametrize("damage", ["", "{", '{"workload": 5}', None], ids=["empty", "cut", "other", "gone"])
def test_whole_checkpoints_are_enough_to_go_on(run: Path, caplog: pytest.LogCaptureFixture, damage: str | None) -> None:
    checkpoint(run)
    if damage is None:
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text(damage)
    assert find_run(run, "") == run
    with pytest.raises(RunFolderError, match=r"its checkpoints are there: .* give the run's --strategy, and"):
        as_before(TrainingRequest("work.py:small"), run)
    asked = TrainingRequest("work.py:small", strategy="dp=2", steps=30)
    with caplog.at_level(logging.WARNING):
        assert as_before(asked, run) == asked
    assert "the run goes on from its checkpoints as the command line says" in caplog.text
    reopen_run(run, REQUEST)
    release_lock(run)
    assert read_run(run)["steps"] == 30
    assert len(read_run(run)["resumes"]) == 1
    if damage is not None:
        assert (run / "run.json.damaged").read_text() == damage


def test_damaged_description_without_checkpoints(run: Path) -> None:
    (run / "run.json").write_text("")
    with pytest.raises(RunFolderError, match=r"run.json is not the description of a run"):
        as_before(TrainingRequest("work.py:small", strategy="dp=2", steps=30), run)


def test_pipe_in_place_of_the_description(run: Path) -> None:
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    with pytest.raises(RunFolderError, match="is a pipe"):
        read_run(run)


def test_damaged_run_is_passed_over_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_folder, "RUNS", tmp_path / "runs")
    first = create_run(None, REQUEST)
    second = create_run(None, REQUEST)
    for folder in (first, second):
        release_lock(folder)
    (second / "run.json").write_text("")
    with caplog.at_level(logging.WARNING):
        assert find_run(None, "small") == first
    assert "it is passed over: to go on with it, give --out" in caplog.text


def test_lost_checkpoints_are_said(run: Path) -> None:
    check_checkpoints(run)
    checkpoint(run)
    check_checkpoints(run)
    assert read_run(run)["first_checkpoint"] == 6
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(RunFolderError, match=r"has lost its checkpoints: .* put them back, or begin anew with another"):
        as_before(TrainingRequest("work.py:small"), run)
    (run / "checkpoints").mkdir()
    with pytest.raises(RunFolderError, match="has lost its checkpoints"):
        check_checkpoints(run)


def test_run_that_ended_had_checkpoints(run: Path) -> None:
    write_summary(run, {"steps": 30})
    with pytest.raises(RunFolderError, match="has lost its checkpoints"):
        check_checkpoints(run)


def test_description_is_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (run / ".run.json.partial").symlink_to(tmp_path / "mine")
    reopen_run(run, REQUEST)
    release_lock(run)
    assert (tmp_path / "mine").read_text() == "precious"
    assert len(read_run(run)["resumes"]) == 1
