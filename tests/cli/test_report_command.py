"""The command `report`, and the reports that other commands leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import BOX, Run

from shardwise.cli import main


def title(page: Path) -> str:
    text = page.read_text()
    return text[text.index("<title>") + 7 : text.index("</title>")]


def test_train_leaves_a_report_and_report_writes_another(run: Run, folder: Path) -> None:
    done = run("train", "work.py:small", "--strategy", "dp=2", "--epochs", "1", "--out", "a", "--quiet")
    assert done.stdout.rstrip().endswith("report: a/report.html")
    assert title(folder / "a" / "report.html") == "small · Shardwise"
    done = run("report", "a", "--out", "b.html", "--json")
    assert json.loads(done.stdout) == {"report": "b.html"}
    assert "first step of each run was computed on one process too" in (folder / "b.html").read_text()
    done = run("report", "a")
    assert done.stdout == "report: report.html\n"


def test_a_run_that_failed_leaves_a_report(run: Run, folder: Path) -> None:
    arguments = ("train", "work.py:small", "--set", "fail=raise", "--set", "samples=80", "--out", "a", "--quiet")
    run(*arguments, "--strategy", "dp=2", "--no-proof", status=1)
    assert "still running, or ended without its summary" in (folder / "a" / "report.html").read_text()


def test_compare_leaves_its_report_in_runs(run: Run, folder: Path) -> None:
    command = ("compare", "work.py:small", "--strategy", "single", "--strategy", "dp=2", "--steps", "3", "--quiet")
    done = run(*command, "--json")
    report = folder / json.loads(done.stdout)["report"]
    assert report == folder / "runs" / "small-compare-1" / "report.html"
    assert "was the fastest of 2 runs" in report.read_text()
    assert run(*command).stdout.rstrip().endswith("report: runs/small-compare-2/report.html")


def test_verify_and_plan_and_simulate_write_pages(run: Run, folder: Path) -> None:
    run("verify", "work.py:small", "--strategy", "dp=2", "--steps", "1", "--report", "v.html")
    assert "small: dp=2 computes the same as one worker" in (folder / "v.html").read_text()
    (folder / "box.toml").write_text(BOX)
    plan = run("plan", "work.py:small", "--cluster", "box.toml", "--report", "p.html", "--json")
    best = json.loads(plan.stdout)["best"]
    assert (
        f"small on {'1 worker' if best == 'single' else '2 workers'} of box: {best}" in (folder / "p.html").read_text()
    )
    slow = run(
        "simulate", "work.py:small", "--cluster", "box.toml", "--strategy", "dp=2", "--bandwidth", "0.1", "--json"
    )
    usual = run("simulate", "work.py:small", "--cluster", "box.toml", "--strategy", "dp=2", "--json")
    times = [json.loads(each.stdout)["candidates"][0]["step_seconds"] for each in (slow, usual)]
    assert times[0] > times[1]


def test_validate_writes_a_page(run: Run, folder: Path) -> None:
    runs = Path(__file__).parents[1] / "published" / "runs.csv"
    lines = runs.read_text().splitlines()
    (folder / "few.csv").write_text("\n".join(lines[:6]) + "\n")
    run("validate", "few.csv", "--report", "page.html")
    assert "published runs are off by" in (folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report",), "RUN is missing: folder of a run or of a comparison"),
        (("report", "nowhere"), "nowhere does not exist: give the folder of a run"),
        (("report", "."), ". holds no run: give the folder of a run"),
        (("report", "work.py"), "work.py is not a folder"),
        (("report", ".", "--out", "none/page.html"), "out=none/page.html: there is no folder none"),
        (
            ("simulate", "gpt:layers=1", "--cluster", "h100", "--strategy", "dp=1", "--bandwidth", "0"),
            "bandwidth=0: how",
        ),
        (("plan", "--check", "p.toml", "--report", "x.html"), "leave out --report"),
    ],
)
def test_wrong_requests_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    try:
        status = main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    errors = capsys.readouterr().err
    assert status == 2
    assert said in errors
    assert errors.count("\n") == 1
