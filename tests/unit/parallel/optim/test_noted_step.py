"""torch knows of a step that it has not seen, through an attribute of its own that a version of it may rename."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from shardwise.parallel.optim.schedule import note_step


def moved(*, noted: bool) -> list[str]:
    """Move a schedule before the first step of its optimizer; return what torch warns of."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = StepLR(optimizer, 1)
    if noted:
        note_step(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    return [str(each.message) for each in caught]


def test_torch_warns_of_a_schedule_that_moves_first_unless_a_step_is_noted() -> None:
    (warning,) = moved(noted=False)
    assert "optimizer.step()" in warning
    assert moved(noted=True) == []
