"""`shardwise.__all__` is the public face: sorted, complete, and each name can be imported."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import shardwise


def test_sorted_and_unique() -> None:
    assert shardwise.__all__ == sorted(set(shardwise.__all__))


def test_the_commands_are_functions_of_the_package() -> None:
    commands = {"train", "train_parallel", "parallelize", "plan", "simulate", "compare", "verify", "validate"}
    assert commands | {"calibrate", "export"} <= set(shardwise.__all__)
    importlib.import_module("shardwise.planner.plan")  # no module may take a function's place
    assert all(callable(getattr(shardwise, name)) for name in commands)


@pytest.mark.parametrize("name", shardwise.__all__)
def test_importable_and_documented(name: str) -> None:
    value = getattr(shardwise, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(shardwise)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train_paralel'"):
        _ = shardwise.train_paralel


def test_changelog_knows_the_version() -> None:
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert not released or released[0] == shardwise.__version__
