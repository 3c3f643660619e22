"""Equal segments of several profiles of a workload are analysed once, and the profiles are as if each was alone."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.predict.profile import segment_recorder
from shardwise.predict.profile.profiler import Profiles
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload

SPEC = "gpt:layers=2,hidden=64,heads=4,vocabulary=256,sequence=32,batch_size=8,precision=bf16"


def test_profiles_that_share_analyses_are_those_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run = 0, segment_recorder._SegmentRun.analysis

    def counted(segment: Any) -> Any:
        nonlocal ran
        ran += 1
        return run(segment)

    monkeypatch.setattr(segment_recorder._SegmentRun, "analysis", counted)
    together = Profiles(load_workload(SPEC))
    for text, shares in (("tp=2", False), ("tp=2,sp=1", False), ("tp=2,sp=1,recompute=full", True), ("tp=4", False)):
        strategy = Strategy.parse(f"{text},microbatches=4")
        ran = 0
        found = together.of(strategy)
        few, ran = ran, 0
        alone = Profiles(load_workload(SPEC)).of(strategy)
        assert found == alone, text
        assert (few < ran) is shares, text
