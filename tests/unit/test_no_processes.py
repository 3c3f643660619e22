"""The guard of tests/unit/conftest.py refuses every way to start a process, so that `make unit` starts none."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest


def spawn(method: str) -> None:
    multiprocessing.get_context(method).Process(target=int).start()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(lambda: subprocess.run([sys.executable, "-c", ""], check=True), id="subprocess"),
        pytest.param(lambda: os.system("true"), id="system"),
        pytest.param(os.fork, id="fork"),
        pytest.param(lambda: spawn("fork"), id="multiprocessing-fork"),
        pytest.param(lambda: spawn("spawn"), id="multiprocessing-spawn"),
    ],
)
def test_a_process_is_refused(start: Callable[[], object], processes_started: list[str]) -> None:
    with pytest.raises(RuntimeError, match="a unit test starts no process"):
        start()
    assert processes_started
    processes_started.clear()
