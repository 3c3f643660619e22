"""Profiles between two sizes of microbatch, where a single sample runs other kernels than several do."""

from __future__ import annotations

from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.profiler import Profiles
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt


def test_a_single_sample_along_the_sequence_has_its_own_kernels() -> None:
    scaled = ScaledProfiles(Profiles(gpt(2, 64, 4, vocabulary=256, sequence=32, batch_size=8)))
    strategy = Strategy.parse("tp=2,sp=1,microbatches=8")
    found, traced = scaled.of(strategy), scaled.traced.of(strategy)
    assert [each.layer for each in found.segments] == [each.layer for each in traced.segments]
