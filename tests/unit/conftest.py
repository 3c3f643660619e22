"""A small GPT and four devices, for tests of planning; modules with others of their own define them.

The model is traced once for all of them.
"""

from __future__ import annotations

import functools
import multiprocessing.util
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
from small_gpt import SPEC

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.profiler import Profiles
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload


@functools.cache
def traced() -> Profiles:
    return Profiles(load_workload(SPEC))


@pytest.fixture(scope="module")
def workload() -> Workload:
    return traced().workload


@pytest.fixture(scope="module")
def profiles(workload: Workload) -> ScaledProfiles:
    return ScaledProfiles(traced() if workload is traced().workload else Profiles(workload))


@pytest.fixture(scope="module")
def no_context() -> Iterator[None]:
    """Leave out the CUDA context and the communicators, beside which all memory of a small model is nothing."""
    with mock.patch("shardwise.predict.closed_form.device_memory._context", return_value=0):
        yield


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return find_cluster("a100-40x4")


STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.startfile"}
"""Audit events of a process that starts."""

_watched: list[str] | None = None
"""Processes that the running unit test has tried to start; None between unit tests."""


def refuse_processes(event: str, details: tuple[object, ...]) -> None:
    if _watched is not None and event in STARTS:
        _watched.append(f"{event}{details}")
        raise RuntimeError("a unit test starts no process: tests/processes is for those")


def refuse_spawn(*details: object) -> None:
    refuse_processes("os.posix_spawn", details)


sys.addaudithook(refuse_processes)


@pytest.fixture(autouse=True)
def processes_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail a unit test that starts a process, even where the refusal is caught; yield what was refused."""
    global _watched
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", refuse_spawn)  # it raises no audit event
    started: list[str] = []
    _watched = started
    yield started
    _watched = None
    assert started == []
