"""Gradients of replicas join in one place: reducers that join fewer workers, or none, serve every engine."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from equality import DOUBLE_TOLERANCE, paste, portable, tensor_error
from pool import Pools
from torch import Tensor

from shardwise.parallel.data import module_engine
from shardwise.parallel.data.joining import Joining, joining_of
from shardwise.parallel.data.reducer import ExactReducer, Flat, OwnGradients
from shardwise.parallel.graph import graph_engine
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.optim.clipping import local_gradients
from shardwise.parallel.program import Program
from shardwise.strategy import Strategy
from shardwise.workload.float64 import in_float64
from shardwise.workload.recipes.language import language
from shardwise.workload.workload import Workload


def work() -> Workload:
    return in_float64(language(sequence=16, layers=2, hidden=64, batch_size=8, dropout=0.0))


def apart(mesh: Mesh, position: Any) -> Joining | None:
    """Return reducers that leave the replicas of `dp` apart."""
    strategy, sharing = mesh.strategy, mesh.group("fsdp")
    own = OwnGradients(strategy.replicas, lambda flat, what: handed.append((flat, what)))
    if not strategy.splits_parameters:
        return Joining(own if sharing is None else ExactReducer(sharing, strategy.replicas))
    assert sharing is not None
    return Joining(own, ExactReducer(sharing, strategy.fsdp), own)


handed: list[tuple[Tensor, Flat]] = []


def tried(strategy: str, joining: Any = None) -> tuple[list[Any], bool, int]:
    """Compute a gradient. Returns its pieces, averaged over `dp` if replicas were apart, whether they differed, and the
    number of flat gradients that were handed on."""
    handed.clear()
    real = joining or joining_of
    with mock.patch.object(module_engine, "joining_of", real), mock.patch.object(graph_engine, "joining_of", real):
        program = Program.build(work(), Strategy.parse(strategy))
    share = next(iter(program.loader().shares(0)))
    with program.tried(share, share.samples):
        differ = False
        for gradient in local_gradients(program.engine.parameters).values() if joining else ():
            group = program.mesh.group("dp")
            mine = gradient.clone()
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)
            differ |= not torch.allclose(mine, gradient)
        return [portable(piece) for piece in program.gradient_pieces()], differ, len(handed)


STRATEGIES = (
    "dp=2",
    "dp=2,microbatches=2",
    "dp=2,fsdp=2",
    "dp=2,fsdp=2,zero=1",
    "dp=2,tp=2",
    "dp=2,pp=2",
    "dp=2,compile=1",
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replicas_that_stay_apart_have_gradients_of_their_own(workers: Pools, strategy: str) -> None:
    count = Strategy.parse(strategy).workers
    expected = workers(count, tried, strategy)
    found = workers(count, tried, strategy, apart)
    assert not any(differ for _, differ, _ in expected)
    assert all(differ for _, differ, _ in found)
    assert all(bool(number) == ("zero=1" not in strategy) for _, _, number in found)
    full = [paste([piece for pieces, *_ in parts for piece in pieces]) for parts in (found, expected)]
    assert tensor_error(*full)[0] < DOUBLE_TOLERANCE
