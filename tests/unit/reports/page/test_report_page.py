"""The page of a report says what there is, says what is missing, and lets nothing of a user's become code."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.made_run import MadeRun, comparison, what_if, write
from shardwise.commands.report import runs_document, write_report
from shardwise.errors import RunFolderError
from shardwise.reports.page.page import render

EVIL = "<script>alert('x')</script> & \"name\""


def page_of(*folders: Path) -> str:
    return render(runs_document(list(folders)))


def words_of(page: str) -> str:
    """Return what a person reads: the page without scripts, styles and tags."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def panels_of(page: str) -> list[str]:
    return re.findall(r'<section id="([a-z-]+)" class="panel"', page)


def charts_of(page: str) -> list[str]:
    return [chart["kind"] for chart in data_of(page)["charts"]]


def test_a_run_has_every_panel(tmp_path: Path) -> None:
    folder = MadeRun().write(tmp_path / "run")
    write(folder / "what_if.json", what_if())
    page = page_of(folder)
    assert panels_of(page) == [
        "strategies", "split", "timeline", "pipeline", "memory", "ranks", "curves", "proof", "scaling", "what-if",
        "model", "setup",
    ]  # fmt: skip
    assert 'class="missing"' not in page
    assert {"bars", "timeline", "heat", "lines", "what-if"} <= set(charts_of(page))
    words = words_of(page)
    assert "made-up was trained for 40 steps on 4 workers of made-up box under dp=2,pp=2,microbatches=4" in words
    assert "A step took 100.0 ms; predicted before the run: 93.0 ms (-7%)." in words
    assert "shardwise train image --strategy dp=2,pp=2,microbatches=4 --set batch_size=64 --steps 40 --seed 0" in words


def test_each_chart_has_its_numbers_as_a_table_or_its_words(tmp_path: Path) -> None:
    page = page_of(MadeRun().write(tmp_path / "run"))
    for view in re.findall(r'<div class="view".*?(?=<div class="view"|</section>)', page, re.S):
        if "data-chart" in view:
            assert "<table>" in view
            assert re.search(r'role="img" tabindex="0" aria-label="[^"]+', view)


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(MadeRun().write(tmp_path / "run"))
    markup = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", markup)
    assert "default-src 'none'" in page
    assert not re.search(r"\son[a-z]+=", markup)  # no handlers within elements


def test_text_of_users_is_no_code(tmp_path: Path) -> None:
    run = MadeRun(workload=EVIL).write(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    write(run / "summary.json", {**summary, "notes": [EVIL]})
    page = page_of(run)
    assert "<script>alert" not in page
    assert page.count("<script") == 3
    assert EVIL in words_of(page)
    assert data_of(page)["report"]["title"] == EVIL


def test_a_run_that_was_ended_early(tmp_path: Path) -> None:
    run = MadeRun(ended=False).write(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "epo')
    for name in ("ranks.jsonl", "timeline.json", "memory.json", "prediction.json"):
        (run / name).unlink()
    words = words_of(page_of(run))
    assert "It is still running, or ended without its summary" in words
    assert "ends in half a line" in words
    assert "How long each rank worked in each step is not known: the run's folder has no ranks.jsonl." in words
    assert "Memory was neither predicted nor measured." in words
    assert "How the model was cut is not known: the run's folder has no prediction.json." in words
    assert "The loss went from" in words


def test_a_run_without_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder / "run.json", MadeRun().request())
    words = words_of(page_of(folder))
    assert "the run has not completed a step" in words
    assert "No step was completed: there is no loss." in words
    assert "No step was measured or predicted" in words


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    page = page_of(MadeRun(nan_from=11).write(tmp_path / "run"))
    assert "the loss is not a number in 30 of 40 steps, from step 11 on" in words_of(page)
    assert all("NaN" not in json.dumps(chart) for chart in data_of(page)["charts"])
    none = page_of(MadeRun(nan_from=1).write(tmp_path / "none"))
    assert "No loss is a finite number" in words_of(none)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"results": 3, "rows": {"a": 1}, "ranks": "x"}'])
@pytest.mark.parametrize("name", ["summary.json", "prediction.json", "timeline.json", "memory.json", "what_if.json"])
def test_damaged_files_are_said_and_left_out(tmp_path: Path, name: str, content: str) -> None:
    run = MadeRun().write(tmp_path / "run")
    (run / name).write_text(content)
    assert "trained" in words_of(page_of(run))


def test_values_of_other_types_count_as_missing(tmp_path: Path) -> None:
    run = MadeRun().write(tmp_path / "run")
    for name in ("summary.json", "prediction.json", "memory.json"):
        content = json.loads((run / name).read_text())
        write(run / name, dict.fromkeys(content, "text") | {"strategy": "dp=2,pp=2,microbatches=4"})
    (run / "ranks.jsonl").write_text('{"step": "x", "busy_seconds": [null, "a"]}\n{"step": 2, "busy_seconds": []}\n')
    assert "made-up" in words_of(page_of(run))


def test_one_rank_and_a_thousand(tmp_path: Path) -> None:
    one = words_of(page_of(MadeRun(strategy="single").write(tmp_path / "one")))
    assert "There is one rank: nothing to compare." in one
    many = page_of(MadeRun(strategy="dp=1000", steps=6, events=3000).write(tmp_path / "many"))
    words = words_of(many)
    assert "The 16 fullest of 1,000 ranks are drawn" in words
    assert "6 steps of 1,000 ranks: a cell shows the slowest of up to 1 steps and 8 ranks." in words
    assert "the first 64 of 1000 ranks" in words
    assert len(many) < 5_000_000


def test_a_comparison_shows_failed_strategies_and_regret(tmp_path: Path) -> None:
    words = words_of(page_of(comparison(tmp_path / "compared")))
    assert "dp=4 was the fastest of 5 runs, 74.0 ms a step, 2.8 times the speed of one worker. 1 failed." in words
    assert "failed: worker 2 died: made up" in words
    assert "Regret: it was 24% slower than the strategy that turned out fastest." in words
    assert "regret of the choice 24%" in words
    assert "DDP by hand, 4 workers 74.5 ms" in words


def test_the_verdict_is_about_a_strategy_not_a_loop_by_hand(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "compared")
    content = json.loads((folder / "compare.json").read_text())
    content["by_hand"][0]["measured_seconds"] = 0.01
    write(folder / "compare.json", content)
    assert "dp=4 was the fastest of 5 runs" in words_of(page_of(folder))


def test_an_interrupted_comparison_says_so(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "compared")
    content = json.loads((folder / "compare.json").read_text())
    write(folder / "compare.json", {**content, "interrupted": True, "equal": ["dp=4", "tp=4"]})
    words = words_of(page_of(folder))
    assert "The comparison was interrupted: it shows what was measured until then." in words
    assert "Within the spread of the measurements tp=4 cannot be told apart from it." in words


def test_strategies_within_the_spread_are_called_equal(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "compared")
    content = json.loads((folder / "compare.json").read_text())
    content["samples"]["tp=4"] = content["samples"]["dp=4"]
    write(folder / "compare.json", content)
    words = words_of(page_of(folder))
    assert "Within the spread of the measurements DDP by hand, 4 workers, tp=4 cannot be told apart from it." in words


def test_runs_of_one_strategy_are_told_apart(tmp_path: Path) -> None:
    words = words_of(page_of(MadeRun().write(tmp_path / "a"), MadeRun().write(tmp_path / "b")))
    assert "dp=2,pp=2,microbatches=4 (a)" in words
    assert "dp=2,pp=2,microbatches=4 (b)" in words


def test_a_verification_has_a_page(tmp_path: Path) -> None:
    result = {"strategy": "tp=2", "steps": 3, "loss_error": 1e-7, "tolerance": 1e-4, "passed": True}
    write(tmp_path / "verification.json", {"workload": "w", "results": [result, {**result, "passed": False}]})
    words = words_of(page_of(tmp_path))
    assert "tp=2 does not compute the same as one worker" in words
    assert "largest difference 1.0e-07, allowed 1.0e-04" in words


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run: give the folder of a run"):
        runs_document([tmp_path])
    with pytest.raises(RunFolderError, match="does not exist"):
        runs_document([tmp_path / "none"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is not a folder"):
        runs_document([tmp_path / "file"])


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report(tmp_path / "none" / "page.html", runs_document([MadeRun().write(tmp_path / "run")]))


def test_what_would_change_it_comes_from_the_what_if_cells(tmp_path: Path) -> None:
    folder = MadeRun(strategy="tp=4").write(tmp_path / "run")
    made = what_if()
    write(folder / "what_if.json", made)
    words = words_of(page_of(folder))
    here = next(cell for cell in made["cells"] if (cell["devices"], cell["bandwidth"], cell["batch"]) == (4, 1.0, 64))
    rates = {each["strategy"]: each["samples_per_second"] for each in here["candidates"]}
    assert f"Another strategy: dp=4 is predicted {rates['dp=4'] / rates['tp=4']:.2f} times the samples/s here." in words
    assert "10 times the bandwidth of all links" in words
    assert "8 devices instead of 4" in words
