"""Packages count by what the process of a plain training grows when it imports them with a model."""

from __future__ import annotations

import sys

import pytest
import torch

from shardwise.run.calibration import libraries
from shardwise.run.calibration.libraries import imported_with_a_model, library_sizes


@pytest.mark.parametrize(("installed", "found"), [(True, {"transformers": 60}), (False, {})])
def test_sizes(installed: bool, found: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([100, 160])
    monkeypatch.setattr(libraries, "settled", lambda device: next(sizes))
    monkeypatch.setattr(libraries, "imported_with_a_model", lambda name: installed)
    assert library_sizes() == found


def test_nothing_counts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "default_device", lambda: torch.device("cuda", 0))
    assert library_sizes() == {}


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert not imported_with_a_model("transformers")
