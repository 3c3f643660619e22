"""The random state of a worker's own device."""

from __future__ import annotations

import pytest
import torch

from shardwise.parallel.mesh import random_state_kept


def test_the_state_of_the_cpu_is_restored() -> None:
    torch.manual_seed(3)
    with random_state_kept():
        drawn = torch.rand(4)
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize(("used", "kept"), [(True, [5]), (False, [])])
def test_of_a_hosts_gpus_only_the_one_in_use_is_looked_at(
    used: bool, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(devices))
    random_state_kept()
    assert asked == [kept]
