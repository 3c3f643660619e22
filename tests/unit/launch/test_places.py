"""Ranks in the order of places: workers of one host in a row, hosts of one switch in a row."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from datetime import timedelta

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shardwise.errors import RequestError
from shardwise.launch import context
from shardwise.launch.context import rank_context
from shardwise.launch.places import Location, order_of, take_place
from shardwise.launch.ranks import RankContext

SPREAD = [Location("", "a"), Location("", "b"), Location("", "a"), Location("", "b")]
BY_NAME = [Location("east", "n1"), Location("west", "n2"), Location("east", "n3"), Location("west", "n4")]


def test_workers_of_a_host_come_in_a_row() -> None:
    assert order_of(SPREAD) == [0, 2, 1, 3]


def test_hosts_of_a_switch_come_in_a_row() -> None:
    assert order_of(BY_NAME) == [0, 2, 1, 3]
    assert order_of([*BY_NAME, *BY_NAME]) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_an_order_that_is_right_stays() -> None:
    assert order_of(sorted(SPREAD, key=lambda place: place.host)) == [0, 1, 2, 3]
    assert order_of([Location("", "a")] * 3) == [0, 1, 2]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_settled", None)
    monkeypatch.setattr(socket, "gethostname", lambda: "b")
    monkeypatch.setenv("RANK", "1")


def worker(rank: int, local_workers: int = 2) -> RankContext:
    return RankContext(rank=rank, workers=4, local_rank=0, local_workers=local_workers, address="a", port=1)


def store_with(others: list[Location], but: int) -> HashStore:
    store = HashStore()
    for rank, place in enumerate(others):
        if rank != but:
            store.set(f"place-{rank}", f'["{place.switch}", "{place.host}"]')
    return store


@pytest.mark.usefixtures("settled")
def test_a_worker_takes_the_rank_of_its_place() -> None:
    found = take_place(worker(1), store_with(SPREAD, 1))
    assert found == replace(worker(1), rank=2)
    assert rank_context() == found
    assert os.environ["RANK"] == "2"
    assert rank_context({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) != found


@pytest.mark.usefixtures("settled")
def test_where_neighbours_are_near_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    near = sorted(SPREAD, key=lambda place: place.host)
    assert take_place(worker(2), store_with(near, 2)) == worker(2)
    assert os.environ["RANK"] == "1"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("settled")
def test_a_worker_that_does_not_come_is_told() -> None:
    store = store_with(SPREAD[:3], 1)
    store.set_timeout(timedelta(milliseconds=50))
    with pytest.raises(RequestError, match=r"rank 1 of 4 \(environment\): not all workers came within 120 s"):
        take_place(worker(1), store)


@pytest.mark.usefixtures("settled")
def test_on_one_host_nobody_asks() -> None:
    assert take_place(worker(1, local_workers=4), None) == worker(1, local_workers=4)


@pytest.mark.usefixtures("settled")
def test_rank_0_keeps_its_rank_and_says_that_others_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a")
    assert take_place(worker(0), store_with(SPREAD, 0)).rank == 0
    assert "ranks are numbered anew" in capsys.readouterr().err
