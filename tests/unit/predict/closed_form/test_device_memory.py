"""Memory beside the tensors of a worker: bounds that agree with it, and the margin that a plan leaves free."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwise.cluster.cluster import MARGIN, Cluster, KernelCurve, Nodes, Sample
from shardwise.cluster.find import find_cluster
from shardwise.errors import RequestError
from shardwise.predict.closed_form.device_memory import CUDA_CONTEXT, at_least, in_process, left_for_tensors
from shardwise.predict.hardware.constants import constants
from shardwise.predict.prediction import CATEGORIES, Memory
from shardwise.strategy import Strategy

GPU, CPU = find_cluster("h100x8").device(0), find_cluster("epyc-7763x2").device(0)
TENSORS = Memory(parameters=10**9, gradients=10**9, optimizer=2 * 10**9, activations=10**9, temporary=10**9)


def test_a_gpu_holds_fragments_its_context_and_a_communicator_for_each_axis() -> None:
    alone = in_process(TENSORS, GPU, Strategy())
    assert (alone.process, alone.context) == (0, CUDA_CONTEXT)
    assert alone.fragments == round(constants().allocator_slack * TENSORS.tensors)
    assert alone.allocated == alone.tensors == TENSORS.tensors
    assert alone.total == sum(getattr(alone, name) for name in CATEGORIES)
    assert in_process(TENSORS, GPU, Strategy.parse("dp=8,tp=4,pp=12")).context == round(constants().context_bytes)
    assert CUDA_CONTEXT < in_process(TENSORS, GPU, Strategy(dp=8)).context < constants().context_bytes / 2


def test_a_cpu_has_what_was_measured_of_its_process() -> None:
    assert in_process(TENSORS, CPU, Strategy(dp=2)).total == TENSORS.tensors
    measured = replace(CPU, process={"module": 100, "sharded": 150, "graph": 300}, heap=1.5)
    assert in_process(TENSORS, measured, Strategy(dp=2)).process == 100 + 10**9
    assert in_process(TENSORS, measured, Strategy.parse("tp=2,fsdp=2")).process == 350 + 10**9


@pytest.mark.parametrize("text", ["single", "dp=8", "fsdp=4,tp=2", "pp=2,tp=2"])
@pytest.mark.parametrize("device", [GPU, CPU, replace(GPU, process={"module": 10**8})])
def test_bounds_agree_with_the_memory(device: object, text: str) -> None:
    assert isinstance(device, type(GPU))
    strategy = Strategy.parse(text)
    total = at_least(TENSORS.tensors, device, strategy)
    assert total == pytest.approx(in_process(TENSORS, device, strategy).total, abs=2)
    assert left_for_tensors(total, device, strategy) == pytest.approx(TENSORS.tensors, abs=2)


def test_a_margin_of_the_memory_stays_free() -> None:
    cluster = find_cluster("h100x8")
    assert cluster.least_memory(8) == int(GPU.memory_bytes * (1 - MARGIN))
    assert cluster.with_margin(0).least_memory(8) == GPU.memory_bytes
    assert cluster.with_margin(0.2).with_margin(None) == cluster
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(RequestError, match="must be a share of the memory"):
            cluster.with_margin(wrong)


def test_workers_of_a_measured_host_share_its_memory() -> None:
    curve = KernelCurve("memory", "float32", (Sample((1024,), 1e-6),), "copy")
    host = replace(CPU, curves=(curve,), memory_bytes=1000)
    cluster = Cluster(name="here", nodes=(Nodes(host, 4, 2),), levels=(), margin=0.0)
    assert [cluster.least_memory(workers) for workers in (1, 2, 4, 8)] == [1000, 500, 250, 250]
    sockets = replace(cluster, nodes=(Nodes(replace(CPU, memory_bytes=1000), 4, 2),))
    assert sockets.least_memory(8) == 1000, "a device of the catalogue has memory of its own"
