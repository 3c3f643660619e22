from __future__ import annotations

import pytest

from shardwise.errors import RequestError
from shardwise.launch.context import LOCAL_WORKER, rank_context

MEETING = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_a_worker_of_torchrun() -> None:
    context = rank_context(
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
        | MEETING
    )
    assert context is not None
    assert (context.rank, context.workers, context.local_rank, context.elastic) == (3, 8, 1, True)
    assert not context.one_host


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", LOCAL_WORKER: "1"},
        MEETING,
    ],
    ids=lambda environment: ",".join(environment) or "nothing",
)
def test_what_is_left_behind_in_a_shell_is_no_launcher(environment: dict[str, str]) -> None:
    assert rank_context(environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "2", "WORLD_SIZE": "2"} | MEETING, "RANK=2 is not below WORLD_SIZE=2: start ranks 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"} | MEETING, "RANK=x"),
        ({"RANK": "-1", "WORLD_SIZE": "2"} | MEETING, "RANK=-1"),
        ({"RANK": "٣", "WORLD_SIZE": "4"} | MEETING, "RANK=٣"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": ""}, "MASTER_PORT="),
    ],
)
def test_a_wrong_place_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        rank_context(environment)
