"""The watch over hosts: what it says of a loss, and who takes part in it."""

from __future__ import annotations

import json
import socket
import time

import pytest

from shardwise.errors import RequestError
from shardwise.launch import host_watch
from shardwise.launch.board import OutOfReach, StoreBoard
from shardwise.launch.host_watch import HOST_SETTING, HostWatch, Peer, host_seconds, loss
from shardwise.launch.meeting import Meeting
from shardwise.launch.ranks import RankContext

END = "all workers are ended; --resume goes on from the last checkpoint"
HUB = RankContext(
    rank=0, workers=3, local_rank=0, local_workers=1, address="127.0.0.1", port=1, keeps_store=True, engine="slurm"
)


class Store:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def set(self, name: str, text: str) -> None:
        self.texts[name] = text


class Board(StoreBoard):
    def __init__(self) -> None:
        super().__init__("127.0.0.1", 1, "job")

    def add(self, name: str) -> int:
        raise OutOfReach(name)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses with which the hub would have ended this process."""
    statuses: list[int] = []

    monkeypatch.setattr(host_watch, "_exit", statuses.append)
    return statuses


def greeted(hub: HostWatch, rank: int, token: str | None = None) -> socket.socket:
    store = Store()
    if hub._listener is None:
        hub.begin(Meeting(store, "127.0.0.1", 1))
    assert hub._listener is not None
    connection = socket.create_connection(("127.0.0.1", hub._listener.getsockname()[1]), timeout=5)
    greeting = {"token": hub._token if token is None else token, "rank": rank, "host": f"n{rank}"}
    connection.sendall(json.dumps(greeting).encode() + b"\n")
    return connection


def await_peers(hub: HostWatch, count: int) -> None:
    end = time.monotonic() + 10
    while len(hub._peers) != count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_connection_that_ends_without_a_farewell_is_a_loss(
    said: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    hub = HostWatch(HUB, Board())
    first, second = greeted(hub, 1), greeted(hub, 2)
    await_peers(hub, 2)
    second.close()
    assert hub.noticed.wait(10)
    assert b"gone" in first.recv(100)
    end = time.monotonic() + 10
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    assert said == [1]
    assert capsys.readouterr().err.startswith("shardwise: worker 2 on host n2 ended without a word")


def test_a_farewell_is_no_loss_and_strangers_are_none_either(said: list[int]) -> None:
    hub = HostWatch(HUB, Board())
    stranger, worker = greeted(hub, 1, token="x"), greeted(hub, 2)
    assert stranger.recv(100) == b""
    worker.sendall(b'{"bye": true}\n')
    assert worker.recv(100) == b""
    for _ in range(3):
        greeted(hub, 1, token="[" * 5000).close()
    assert not hub.noticed.wait(0.5)
    hub.leave()
    assert said == []


@pytest.mark.parametrize(
    ("lost", "others", "line"),
    [
        ({Peer(1, "b"): True}, [], "host b (worker 1) cannot be reached for 30 s"),
        ({Peer(1, "b"): True}, [Peer(2, "b"), Peer(3, "c")], "host b (workers 1, 2) cannot be reached for 30 s"),
        ({Peer(1, "b"): True, Peer(5, "c"): False}, [], "host b (worker 1) cannot be reached for 30 s"),
        ({Peer(3, "b"): False}, [Peer(2, "b")], "worker 3 on host b ended without a word: killed, out of memory?"),
        (
            {Peer(3, "b"): False, Peer(1, "a"): False},
            [],
            "worker 1 on host a and worker 3 on host b ended without a word: killed, out of memory?",
        ),
    ],
)
def test_a_loss_is_one_line(lost: dict[Peer, bool], others: list[Peer], line: str) -> None:
    assert loss(lost, others, 30.0) == f"{line}; {END}"


@pytest.mark.parametrize("text", ["", "soon", "0", "4", "nan", "inf"])
def test_a_wrong_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST_SETTING, text)
    with pytest.raises(RequestError, match=f"SHARDWISE_HOST_SECONDS={text}: must be a number of seconds, at least 5"):
        host_seconds()


def test_a_silent_host_is_gone_within_a_minute_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOST_SETTING, raising=False)
    assert host_seconds() + host_watch.SPARE_SECONDS + host_watch.AGENT_SECONDS <= 60


def test_on_one_host_there_is_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_watch, "_watch", None)
    alone = RankContext(rank=0, workers=2, local_rank=0, local_workers=2, address="127.0.0.1", port=1)
    host_watch.settle(alone, Meeting(Store(), "127.0.0.1", 1), Board())
    assert host_watch._watch is None
