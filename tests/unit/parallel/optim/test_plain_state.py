"""State of an optimizer that is no tensor, through JSON and back."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch

from shardwise.errors import CheckpointError
from shardwise.parallel.optim.plain_state import Unsaved, decode, encode, tensors_in


def test_there_and_back() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    value = {1: (None, True, 2, 0.1, "text", [tensors[0], {}]), "x": OrderedDict(a=tensors[1]), None: float("inf")}
    found = dict(tensors_in(value, "key"))
    assert list(found) == ["key[0][5][0]", "key[1][0]"]
    again = decode(json.loads(json.dumps(encode(value, "key"))), found)
    assert again == value
    assert type(again["x"]) is OrderedDict
    assert again[1][5][0] is tensors[0]


@pytest.mark.parametrize("value", [{1, 2}, defaultdict(int), torch.float32, [object()], {(1, 2): 3}, lambda: 0])
def test_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(Unsaved, match="key"):
        encode(value, "key")


@pytest.mark.parametrize(
    "saved", [{"tensor": "other"}, {"set": []}, {"list": 3}, {"dict": [1]}, {}, [1], {"tensor": []}]
)
def test_what_was_never_written(saved: Any) -> None:
    with pytest.raises(CheckpointError, match="in the state of the optimizer"):
        decode(saved, {"key": torch.ones(1)})
