from __future__ import annotations

import io
from typing import Any

import pytest

from shardwise.reports.live import frame, news, outcome
from shardwise.reports.sparkline import heat, progress_bar, sparkline
from shardwise.reports.terminal import Terminal, in_place_of

STATE: dict[str, Any] = {
    "run": "runs/small",
    "workload": "small",
    "strategy": "dp=2",
    "workers": 2,
    "state": "running",
    "text": "",
    "step": 128,
    "total_steps": 500,
    "epoch": 1,
    "epochs": None,
    "seconds_left": 72.0,
    "seconds_since_step": 0.1,
    "loss": 0.4312,
    "losses": [4.0, 3.0, 2.0, 1.0],
    "first_not_finite_step": None,
    "learning_rate": 0.1,
    "gradient_norm": 1.0,
    "evaluation": {"step": 120, "values": {"loss": 0.5, "accuracy": 0.912}},
    "samples_per_second": 1234.0,
    "step_seconds": 0.0512,
    "predicted_seconds": 0.048,
    "error": -0.0625,
    "busy_seconds": [0.02, 0.04],
    "memory_bytes": 1 << 20,
    "memory_bytes_by_worker": None,
    "predicted_memory_bytes": 2 << 20,
    "checkpoint": {"step": 100, "seconds_ago": 12.0},
    "warnings": [],
}
NOTHING = (
    *("workers", "total_steps", "epoch", "seconds_left", "seconds_since_step", "loss", "evaluation", "checkpoint"),
    *("samples_per_second", "step_seconds", "predicted_seconds", "error", "busy_seconds"),
    *("memory_bytes", "predicted_memory_bytes"),
)
EMPTY = {**STATE, **dict.fromkeys(NOTHING), "state": "starting", "step": 0, "losses": []}


def text(**fields: Any) -> str:
    return "\n".join(frame({**STATE, **fields}, Terminal(width=200)))


def test_frame() -> None:
    assert text().splitlines() == [
        "small under dp=2 on 2 workers  running",
        "  step      128 of 500  ██████░░░░░░░░░░░░░░░░░░  26%  1 min 12 s left",
        "  loss      0.4312  █▆▃▁",
        "  held out  loss 0.5, accuracy 91.20% after step 120",
        "  speed     1,234 samples/s, 51.2 ms per step, predicted 48.0 ms (-6%)",
        "  ranks     ▁█  busy 20.0 ms to 40.0 ms, rank 1 takes 2.00 times the median",
        "  memory    1.0 MiB on rank 0, predicted 2.0 MiB",
        "  saved     checkpoint of step 100, 12.0 s ago",
    ]


def test_frame_of_a_run_without_a_step() -> None:
    assert frame(EMPTY, Terminal()) == [
        "small under dp=2  starting",
        "  step   0  starting",
        "  saved  no checkpoint yet",
    ]


def test_slow_rank_stands_out() -> None:
    shown = text(busy_seconds=[0.02, 0.02, 0.02, 0.04])
    assert "ranks     ▁▁▁█  busy 20.0 ms to 40.0 ms, rank 3 takes 2.00 times the median" in shown
    assert "median" not in text(busy_seconds=[0.02, 0.0201, 0.02, 0.02])
    many = [0.02] * 1000
    many[777] = 0.04
    shown = text(busy_seconds=many)
    assert "rank 777 takes 2.00 times the median (a cell: the slowest of 16 ranks)" in shown
    assert shown.count("█") - text(busy_seconds=None).count("█") == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seconds_since_step": 35.0}, "no step for 35.0 s"),
        ({"seconds_since_step": 35.0, "step_seconds": 6.0}, "1 min 12 s left"),  # less than ten steps
        ({"first_not_finite_step": 7, "loss": None}, "not finite at step 7"),
        ({"epochs": 4}, "epoch 2 of 4"),
        ({"checkpoint": {"step": 100, "seconds_ago": 0.25}}, "checkpoint of step 100, just now"),
        ({"warnings": [{"time": 0, "text": "the disk is slow"}]}, "warning: the disk is slow"),
        ({"memory_bytes_by_worker": [1, 1 << 20]}, "1.0 MiB per worker, predicted"),
        ({"memory_bytes": None}, "2.0 MiB per worker predicted"),
        ({"state": "failed", "text": "worker 1 died"}, "failed after step 128: worker 1 died; --resume goes on from"),
    ],
)
def test_frame_says(fields: dict[str, Any], said: str) -> None:
    assert said in text(**fields)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", ""),
        ("finished", "finished after 128 steps"),
        ("stopped", "told to end after step 128; --resume goes on from step 100"),
        ("interrupted", "interrupted after step 128; --resume goes on from step 100"),
        ("killed", "ended without a word after step 128: killed, or its machine went down; --resume goes on from step"),
        ("unknown", "the file system has no locks"),
    ],
)
def test_outcome(state: str, said: str) -> None:
    assert outcome({**STATE, "state": state}).startswith(said)
    assert bool(said) == bool(outcome({**STATE, "state": state}))
    assert "--resume begins anew" in outcome({**STATE, "state": "killed", "checkpoint": None})


def test_news() -> None:
    step = "step 128 of 500: loss 0.4312, 1,234 samples/s, 51.2 ms per step, predicted 48.0 ms (-6%), 1 min 12 s left"
    held_out = "held out: loss 0.5, accuracy 91.20% after step 120"
    assert news(None, STATE) == ["small under dp=2 on 2 workers", step, held_out, "checkpoint of step 100"]
    assert news(STATE, STATE) == []
    warned = {**STATE, "warnings": [{"time": 1, "text": "slow"}], "state": "finished"}
    assert news(STATE, warned) == ["warning: slow", "finished after 128 steps"]
    assert news(None, EMPTY) == ["small under dp=2"]


def test_narrow_terminal_and_colours() -> None:
    narrow = frame(STATE, Terminal(width=20))
    assert max(map(len, narrow)) == 20
    coloured = frame({**STATE, "state": "failed"}, Terminal(width=20, colour=True))
    assert "\x1b[31m" in "".join(frame({**STATE, "busy_seconds": [1, 1, 1, 2]}, Terminal(colour=True)))
    assert [line.replace("\x1b[0m", "") for line in coloured] != narrow
    assert "\x1b" not in "".join(narrow)


def test_terminal_without_blocks() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal = Terminal.of(stream)
    assert terminal == Terminal(blocks=False)
    "\n".join(frame(STATE, terminal)).encode("ascii")


def test_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert Terminal.of(stream, {}).colour
    assert not Terminal.of(stream, {"NO_COLOR": "1"}).colour
    assert not Terminal.of(stream, {"TERM": "dumb"}).live


def test_pictures() -> None:
    assert sparkline([], 5) == ""
    assert sparkline([3.0, 3.0], 5) == "▁▁"
    assert sparkline(list(range(100)), 4) == "▁▃▆█"
    assert progress_bar(2.0, 4) == "████"
    assert progress_bar(0.5, 4, blocks=False) == "##.."
    assert heat([1.0, 1.0, 3.0, 1.0], 2) == [1.0, 3.0]
    assert heat([0.0, 0.0], 2) == [1.0, 1.0]
    assert in_place_of(0) == ""
    assert in_place_of(3) == "\x1b[3F\x1b[J"
