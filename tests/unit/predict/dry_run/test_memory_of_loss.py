"""A loss in pieces needs the memory of the logits of one piece, and of a gradient of the output layer's weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from unittest import mock

import pytest
from torch import Tensor

from shardwise.parallel.tensor.vocab_parallel import Classes, Exponentials
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt

WORDS, FEATURES, SEQUENCE, SAMPLES = 16384, 64, 128, 8
LOGITS = SAMPLES * SEQUENCE * WORDS
"""Number of logits of the step."""

WEIGHT = WORDS * FEATURES
PIECES = 8


def ran(pieces: int, *, recompute: str = "none") -> DryRun:
    work = gpt(1, FEATURES, 4, vocabulary=WORDS, sequence=SEQUENCE, batch_size=SAMPLES, precision="bf16")
    return dry_run(work, Strategy.parse(f"single,loss_pieces={pieces},recompute={recompute}"), device="gpu")


@cache
def peak(pieces: int, recompute: str = "none") -> int:
    memory = ran(pieces, recompute=recompute).memory
    return memory.activations + memory.temporary


WHOLE = {"none": 12 * LOGITS, "full": 12 * LOGITS, "selective": (12 + 2) * LOGITS}
"""Bytes at the peak of the backward pass: log-softmax, its gradient and that of the logits, in float32.

Selective recomputation also saves the logits in bf16.
"""


def in_pieces(pieces: int) -> int:
    """Return the bytes at the peak: logits in bf16 and float32 of a piece, and the weight's gradient in float32."""
    return (2 + 4) * LOGITS // pieces + 4 * WEIGHT


@pytest.mark.parametrize("recompute", WHOLE)
def test_the_peak_falls_to_that_of_a_piece(recompute: str) -> None:
    saved = peak(0, recompute) - peak(PIECES, recompute)
    assert saved == pytest.approx(WHOLE[recompute] - in_pieces(PIECES), rel=0.05)


def test_logits_that_outlive_their_piece_are_noticed() -> None:
    held: list[Exponentials] = []
    right: Callable[..., Exponentials] = Classes.exponentials

    def holding(self: Classes, logits: Tensor, local: Tensor) -> Exponentials:
        held.append(right(self, logits, local))
        return held[-1]

    expected = peak(PIECES)
    with mock.patch.object(Classes, "exponentials", holding):
        memory = ran(PIECES).memory
    assert memory.activations + memory.temporary > expected + LOGITS
