"""Take part in a job of another launcher, and share the cores among the workers of a host."""

from __future__ import annotations

import os

import pytest

from shardwise.errors import RequestError, StrategyError
from shardwise.launch.join import check_encryption, join_launcher, threads_per_worker


def test_under_another_launcher_the_numbers_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StrategyError, match="2 workers are asked for, the launcher started 4"):
        join_launcher(2)


def test_threads_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert threads_per_worker(1) == cores
    assert threads_per_worker(10 * cores) == 1


def test_tls_that_torch_was_built_without_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PKEY", "CERT", "CA_FILE"):
        monkeypatch.setenv(f"GLOO_DEVICE_TRANSPORT_TCP_TLS_{name}", "host.pem")
    check_encryption()
    monkeypatch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
    with pytest.raises(RequestError, match=r"GLOO_DEVICE_TRANSPORT=TCP_TLS: .*unsupported gloo device.*WireGuard"):
        check_encryption()
