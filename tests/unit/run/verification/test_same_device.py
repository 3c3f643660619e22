"""One worker and all strategies that are compared with it compute on the same kind of device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.run.verification import verify as verification
from shardwise.run.verification.deviation import Deviation
from shardwise.run.verification.verify import Proof, _Prover, compare_all, watched
from shardwise.strategy import Strategy

PROOF = Proof(
    strategy=Strategy(),
    steps=1,
    loss=Deviation(),
    gradient=Deviation(),
    parameter=Deviation(),
    tolerance=1.0,
    sharded_share=1.0,
    uncut=(),
    cut_points=None,
    notes=(),
)


@pytest.mark.parametrize(("gpus", "used"), [(0, False), (1, False), (2, True)])
def test_a_host_with_too_few_gpus_computes_all_of_it_on_its_cpu(
    gpus: int, used: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def run_local(function: Any, args: Any, *, gpus: bool, **others: Any) -> Any:
        asked.append(gpus)
        return [PROOF] * len(args[1]) if args[0] is compare_all else None

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(verification, "run_local", run_local)
    source: Any = SimpleNamespace(load=lambda: SimpleNamespace(batch_size=4))
    _Prover(source, 1, False, 1, tmp_path).prove([Strategy(), Strategy(dp=2)])
    assert asked == [used] * 3  # what one worker computes is recorded, then one and two workers are compared with it


def test_convolutions_are_verified_in_all_bits_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert watched(lambda _: torch.backends.cudnn.allow_tf32, []) is False
