"""A workload that cannot be sent to workers is refused in one line that names the culprit."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import cloudpickle
import pytest

from shardwise.errors import RequestError
from shardwise.launch.sending import written


@dataclass
class Inner:
    dataset: Any


@dataclass
class Outer:
    workload: Inner


def test_the_innermost_field_is_named() -> None:
    with pytest.raises(RequestError, match=r"^dataset cannot be sent to worker processes: TypeError: .*lock.*by name"):
        written((print, (Outer(Inner(threading.Lock())),)))


def test_what_can_be_sent() -> None:
    function, argument = cloudpickle.loads(written((lambda x: x + 1, 2)))
    assert function(argument) == 3
