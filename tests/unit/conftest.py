"""A small GPT and four devices, for tests of planning; modules with others of their own define them."""

from __future__ import annotations

import pytest
from small_gpt import SPEC

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.profiler import Profiles
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load_workload(SPEC)


@pytest.fixture(scope="module")
def profiles(workload: Workload) -> ScaledProfiles:
    return ScaledProfiles(Profiles(workload))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return find_cluster("a100-40x4")
