"""Local workers hash text alike, so that a set has one order on all of them."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.launch import processes


@pytest.mark.parametrize(("own", "given"), [("", "0"), ("random", "0"), ("7", "7")])
def test_the_seed_of_hashes(monkeypatch: pytest.MonkeyPatch, own: str, given: str) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setenv("PYTHONHASHSEED", own)
    monkeypatch.setattr("subprocess.Popen", lambda line, **options: started.append(options["env"]))
    processes._start(0, 2, "/nowhere")
    processes._start(1, 2, "/nowhere")
    assert [environment["PYTHONHASHSEED"] for environment in started] == [given] * 2
