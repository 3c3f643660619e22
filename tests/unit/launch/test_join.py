"""A worker joins its host: cores that it shares, GPUs that it needs, and threads that it waits for at the end."""

from __future__ import annotations

import sys
import threading
import time
import zlib

import pytest
import torch

from shardwise.errors import RequestError
from shardwise.launch.join import _check_gpus, crowding, rest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are shown by Linux")


def test_threads_that_run_are_waited_for() -> None:
    done = threading.Event()

    def compute() -> None:
        zlib.compress(bytes(range(256)) * 400_000, 9)  # without the interpreter
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    rest(seconds=60)
    assert done.is_set()
    thread.join()


def test_threads_that_wait_are_not() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    began = time.monotonic()
    rest(seconds=60)
    assert time.monotonic() - began < 30
    go.set()
    thread.join()


def test_it_does_not_wait_without_end() -> None:
    stop = False

    def spin() -> None:
        while not stop:
            zlib.crc32(bytes(1_000_000))

    thread = threading.Thread(target=spin)
    thread.start()
    rest(seconds=0.1)
    assert thread.is_alive()
    stop = True
    thread.join()


@pytest.mark.parametrize(("gpus", "workers"), [(0, 4), (4, 4), (8, 4)])
def test_a_launcher_may_start_a_worker_for_each_gpu_or_none(
    gpus: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    _check_gpus(workers)


def test_a_launcher_that_starts_more_workers_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RequestError, match="2 workers were started on a host with 1 GPU: start 1 there, or set CUDA"):
        _check_gpus(2)


@pytest.mark.parametrize(
    ("cores", "workers", "environment", "line"),
    [
        (2, 2, {}, ""),
        (2, 16, {}, "16 workers share 2 cores: they take turns, so a step takes longer than on --workers 2"),
        (1, 2, {}, "2 workers share 1 core: they take turns, so a step takes longer than on --workers 1"),
        (2, 16, {"LOCAL_WORLD_SIZE": "2"}, ""),
        (2, 16, {"LOCAL_WORLD_SIZE": "4"}, "4 workers share 2 cores: they take turns, so a step takes longer than on"),
    ],
)
def test_more_workers_than_cores_are_said(
    cores: int, workers: int, environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("SHARDWISE_LOCAL_WORKER", raising=False)
    if environment:
        launcher = {"RANK": "0", "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        for name, value in {**launcher, **environment}.items():
            monkeypatch.setenv(name, value)
    told = crowding(workers)
    assert told.startswith(line) if line else not told
