"""Choose the failure that caused the others, from reports, broken connections and exit statuses."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.errors import WorkerFailed
from shardwise.launch.local import _failure
from shardwise.launch.switchboard import EarlyExit


def report(error: str) -> dict[str, Any]:
    return {"error": error, "message": "", "traceback": ""}


@pytest.mark.parametrize(
    ("endings", "exits"),
    [
        pytest.param([EarlyExit(0, 1.0, report("RuntimeError")), EarlyExit(1, 1.1, None)], {0: 1, 1: -9}, id="killed"),
        pytest.param([EarlyExit(0, 1.0, report("RuntimeError")), EarlyExit(1, 1.1, None)], {1: -15}, id="terminated"),
        pytest.param([EarlyExit(1, 1.0, report("ValueError"))], {1: 1}, id="other still runs"),
        pytest.param([EarlyExit(1, 1.0, None)], {1: 3}, id="other still runs, no word"),
        pytest.param(
            [EarlyExit(0, 1.2, report("RuntimeError")), EarlyExit(1, 1.1, report("E"))], {0: 1, 1: 1}, id="errors"
        ),
        pytest.param([], {1: 127}, id="never connected"),
    ],
)
def test_the_first_failure_is_the_one_that_is_told(endings: list[EarlyExit], exits: dict[int, int]) -> None:
    failure = _failure(endings, exits)
    assert isinstance(failure, WorkerFailed)
    assert failure.rank == 1
