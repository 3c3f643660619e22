"""A server on the loopback device, in threads of this process: waiting, tokens, limits, workers that come back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from serving import SHAPES, first, gradients, trained, work

from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch.beside import listen
from shardwise.parallel.servers import client, handshake, server
from shardwise.parallel.servers.client import ServerGroup
from shardwise.parallel.servers.frames import HEADER, MAGIC, VERSION, Frame, Kind, receive_frame, send_frame
from shardwise.parallel.servers.handshake import chosen_token, greet, prove
from shardwise.parallel.servers.rows import contribution
from shardwise.parallel.servers.server import ParameterServer, ServerSetup

TOKEN = "a token of this test alone"
SHORT = 0.4
"""Seconds in which what must not happen would have happened."""

Start = Callable[..., tuple[str, int]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(workers, staleness)` -> address of a server that lives as long as the test."""
    listeners = []

    def started(workers: int, staleness: int | None = 0, absent: float = 60.0) -> tuple[str, int]:
        listeners.append(listen("127.0.0.1"))
        setup = ServerSetup(
            workload=work(),
            trained=trained(),
            names=tuple(SHAPES),
            workers=workers,
            token=TOKEN,
            staleness=staleness,
            folder=str(tmp_path / str(len(listeners))),
            absent_seconds=absent,
        )
        threading.Thread(target=ParameterServer(setup, listeners[-1]).serve, daemon=True).start()
        host, port = listeners[-1].getsockname()
        return host, port

    yield started
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def group(address: tuple[str, int], rank: int, token: str = TOKEN) -> ServerGroup:
    return ServerGroup([address], token, rank, dict.fromkeys(SHAPES, 0))


def give(servers: ServerGroup, rank: int, together: bool = False) -> list[Frame]:
    tensors, sparse = contribution(gradients(rank, servers.clock))
    facts = {"weight": 1.0, "losses": [1.0], "sparse": sparse}
    return servers.push(facts, tensors, together=together)


def fill(servers: ServerGroup) -> None:
    servers.ask(Kind.WRITE, lambda _: {}, {f"p/{name}": value for name, value in first().items()})


@pytest.mark.parametrize(("staleness", "ahead"), [(1, 1), (3, 3)])
def test_a_fast_worker_waits_when_it_is_so_many_steps_ahead(start: Start, staleness: int, ahead: int) -> None:
    address = start(2, staleness)
    fast, slow = group(address, 0), group(address, 1)
    fill(fast)
    for _ in range(ahead):
        give(fast, 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(give, fast, 0)
        time.sleep(SHORT)
        assert not waiting.done(), "it went on with parameters that are too old"
        give(slow, 1)
        answer = waiting.result(timeout=30)
    assert fast.clock == ahead + 1
    assert answer[0].facts["slowest"] == 1
    assert answer[0].tensors.keys() == {f"p/{name}" for name in SHAPES}


def test_nobody_waits_without_a_bound(start: Start) -> None:
    fast = group(start(2, None), 0)
    fill(fast)
    for _ in range(20):
        give(fast, 0)
    assert fast.clock == 20


def test_a_worker_has_the_updates_of_all_steps_that_are_not_too_new(start: Start) -> None:
    """After its step c it has the parameters of c + 1 - S updates or more, whoever is how fast."""
    staleness, workers, steps = 2, 3, 12
    address = start(workers, staleness)
    servers = [group(address, rank) for rank in range(workers)]
    fill(servers[0])
    seen: list[tuple[int, int]] = []

    def run(rank: int) -> None:
        for _ in range(steps):
            time.sleep(0.002 * rank)
            answer = give(servers[rank], rank)[0]
            seen.append((servers[rank].clock, answer.facts["updates"]))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(workers)))
    assert all(updates >= clock - staleness for clock, updates in seen)
    assert any(updates < clock for clock, updates in seen), "no worker was ever ahead"
    final = [each.ask(Kind.WAIT)[0] for each in servers]
    assert all(answer.facts["updates"] == steps for answer in final)
    for answer in final[1:]:
        assert all(torch.equal(value, final[0].tensors[name]) for name, value in answer.tensors.items())


def test_a_worker_that_does_not_know_the_token_is_refused(start: Start) -> None:
    address = start(1)
    with pytest.raises(RequestError, match="refuses worker 0: the token is another one"):
        group(address, 0, "another token, as long")
    with pytest.raises(RequestError, match="there is no worker 5"):
        group(address, 5)
    group(address, 0)


def test_the_token_is_not_sent_and_no_proof_works_twice(start: Start) -> None:
    address = start(1)
    sending = mock.patch.object(handshake, "send_frame", side_effect=send_frame)
    with socket.create_connection(address) as line, sending as sender:
        greet(line, TOKEN, 0)
    assert sender.called
    assert not any(TOKEN in repr(call) for call in sender.call_args_list)
    with socket.create_connection(address) as line:
        receive_frame(line, 2**16)
        old = {"nonce": "0" * 64, "rank": 0, "proof": prove(TOKEN, "worker", "an earlier nonce", "0" * 64, 0)}
        send_frame(line, Frame(Kind.HELLO, old))
        assert receive_frame(line, 2**16).kind == Kind.WRONG


def test_a_server_that_does_not_know_the_token_is_refused() -> None:
    ours, theirs = socket.socketpair()

    def pretend() -> None:
        send_frame(theirs, Frame(Kind.CHALLENGE, {"nonce": "1"}))
        receive_frame(theirs, 2**16)
        send_frame(theirs, Frame(Kind.WELCOME, {"proof": "0" * 64}))

    with ours, theirs, ThreadPoolExecutor(1) as pool:
        pool.submit(pretend)
        with pytest.raises(handshake.Refused, match="the server does not know the token"):
            greet(ours, TOKEN, 0)


@pytest.mark.parametrize(
    "bytes_sent", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, HEADER.pack(MAGIC, VERSION, 2, 0, 2, 0, 2**40)]
)
def test_what_is_no_greeting_is_hung_up_on_and_others_are_served(start: Start, bytes_sent: bytes) -> None:
    address = start(1)
    with socket.create_connection(address) as line:
        receive_frame(line, 2**16)
        line.sendall(bytes_sent)
        line.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert line.recv(1) == b""
    fill(group(address, 0))


def test_a_request_that_is_too_large_ends_the_connection_alone(start: Start) -> None:
    address = start(1)
    with socket.create_connection(address) as line:
        greet(line, TOKEN, 0)
        line.sendall(HEADER.pack(MAGIC, VERSION, Kind.PUSH, 0, 2, 0, 2**40))
        line.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert line.recv(1) == b""
    fill(group(address, 0))


def test_an_answer_that_was_lost_is_asked_for_again_and_counts_once(start: Start) -> None:
    address = start(1, None)
    servers = group(address, 0)
    fill(servers)
    calls = [0]

    def losing(line: socket.socket, limit: int) -> Frame:
        answer = receive_frame(line, limit)
        calls[0] += 1
        if calls[0] == 2:
            line.close()
            raise OSError("the connection broke after the server had answered")
        return answer

    with mock.patch.object(client, "receive_frame", losing):
        for _ in range(3):
            answer = give(servers, 0)
    assert answer[0].facts["updates"] == 3


def test_a_worker_that_goes_is_dropped_and_one_that_comes_back_is_waited_for(start: Start) -> None:
    address = start(2, 0, absent=0.3)
    stays, goes = group(address, 0), group(address, 1)
    fill(stays)
    goes.close()
    for step in range(3):  # waits for the other until it is dropped
        give(stays, 0, together=True)
        answer = stays.apply(applied=True)
        assert answer[0].facts["updates"] == step + 1
    assert answer[0].facts["members"] == 1
    back = group(address, 1)
    assert (back.clock, back.joint) == (3, 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(give, stays, 0, True)
        time.sleep(SHORT)
        assert not waiting.done(), "it did not wait for the worker that came back"
        give(back, 1, together=True)
        waiting.result(timeout=30)
    assert back.apply(applied=True)[0].facts["members"] == 2


def test_an_error_of_the_optimizer_is_told(start: Start) -> None:
    servers = group(start(1, None), 0)
    fill(servers)
    wrong = {"bias": torch.zeros(7)}
    with pytest.raises(ShardwiseError, match=r"parameter server 0 at 127\.0\.0\.1:.*"):
        servers.push(
            {"weight": 1.0, "losses": [1.0], "sparse": []}, {f"g/{n}": t for n, t in wrong.items()}, together=False
        )


def test_a_short_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(handshake.TOKEN_SETTING, "short")
    with pytest.raises(RequestError, match="SHARDWISE_TOKEN has 5 characters: use 16 or more"):
        chosen_token()
    monkeypatch.delenv(handshake.TOKEN_SETTING)
    assert chosen_token() != chosen_token()


def test_a_server_that_starts_again_has_the_state_that_replaced_its_log(start: Start, tmp_path: Path) -> None:
    with mock.patch.object(server, "LEAST_EVENT_BYTES", 1000):
        servers = group(start(1, None), 0)
        fill(servers)
        for _ in range(20):
            before = give(servers, 0)[0].tensors
    states = list((tmp_path / "1").glob("state-*"))
    assert len(states) == 1, "the log was never replaced, or an old state is left"
    assert int(states[0].name.partition("-")[2]) > 1
    setup = ServerSetup(
        workload=work(),
        trained=trained(),
        names=tuple(SHAPES),
        workers=1,
        token=TOKEN,
        staleness=None,
        folder=str(tmp_path / "1"),
    )
    with socket.socket() as listener:
        again = ParameterServer(setup, listener)._shard
    assert again.updates == 20
    assert all(torch.equal(value, before[name]) for name, value in again.shown_parameters().items())
