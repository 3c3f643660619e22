"""Round numbers for predictions that are summed by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from round_numbers import NUMBERS

from shardwise.predict.hardware.constants import using


@pytest.fixture
def round_numbers() -> Iterator[None]:
    """Let predictions use round numbers, unless a test sets others."""
    with using(NUMBERS):
        yield
