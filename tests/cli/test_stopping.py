"""A run that is told to end writes a checkpoint first, and goes on from it as if nothing had been."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
from command import Run, started

from shardwise.commands.request import settle_options
from shardwise.errors import RequestError

SECONDS = 60.0


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("strategy", ["single", "dp=2", "dp=2,tp=2"])
def test_sigterm_writes_a_checkpoint_and_auto_goes_on(strategy: str, run: Run, folder: Path) -> None:
    length = ("--strategy", strategy, "--epochs", "10", "--checkpoint-every", "1000")
    with started(*length, "--out", "out", "--set", "pause=0.5") as process:
        while not (folder / "out" / "metrics.jsonl").exists() or len(losses(folder / "out")) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 143
    newest = max((folder / "out" / "checkpoints").iterdir())  # beside it may be the best one
    step = int(newest.name.removeprefix("step-"))
    assert errors.splitlines()[-1] == (
        f"shardwise: told to end after step {step}: a checkpoint is in out, --resume goes on"
    )
    run("train", "work.py:small", *length, "--out", "out", "--resume", "auto", "--quiet", "--set", "pause=0")
    run("train", "work.py:small", *length, "--out", "whole", "--resume", "auto", "--quiet")  # there is none: begins
    assert step < 40
    assert losses(folder / "out") == losses(folder / "whole")


def test_what_is_no_resume_is_refused(run: Run) -> None:
    done = run("train", "work.py:small", "--resume=no", status=2)
    assert "auto" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("option", "value"), [("hang_timeout", 0.0), ("hang_timeout", math.nan), ("grace", -1.0)])
def test_times_that_cannot_be_are_refused(option: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"{option}={value:g}: must be "):
        settle_options(**{option: value})
