"""Choice of how workers of one host communicate."""

from __future__ import annotations

import pytest

from shardwise.errors import RequestError
from shardwise.launch.shared_memory.choice import GLOO, SETTING, SHM, transport


def test_it_is_shared_memory_unless_gloo_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, GLOO)
    assert transport() == GLOO
    monkeypatch.delenv(SETTING)
    assert transport() == SHM
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")  # torch checks collectives of its own backends only
    assert transport() == GLOO


def test_a_wrong_choice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "fast")
    with pytest.raises(RequestError, match=r"^SHARDWISE_TRANSPORT=fast: must be shm or gloo$"):
        transport()
