"""`shardwise.__all__` is the public face: sorted, complete, and each name can be imported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardwise


def test_sorted_and_unique() -> None:
    assert shardwise.__all__ == sorted(set(shardwise.__all__))


def test_every_name_has_a_home() -> None:
    assert set(shardwise.__all__) == set(shardwise._HOMES)


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
