"""Between measured points seconds follow the points, outside of them they stay sane; predictions use them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve, Level, Nodes, Sample
from shardwise.cluster.curves import Curves, Line, Surface
from shardwise.collective import Collective, Group
from shardwise.errors import RequestError
from shardwise.predict.hardware.network import collective_seconds as modelled
from shardwise.predict.hardware.times import KernelTimes, collective_seconds, origins
from shardwise.predict.profile.kernel import Kernel

RATE, START = 1e9, 1e-5


def line(*points: tuple[int, float]) -> Line:
    return Line([Sample((size,), seconds) for size, seconds in points])


def product(m: int, n: int, k: int) -> Sample:
    """Return a sample as a machine with one rate and one start would give it."""
    return Sample((1, m, n, k), START + m * n * k / RATE)


def device(**changes: object) -> Device:
    usual: dict[str, object] = {
        "name": "Box",
        "kind": "cpu",
        "flops": {"float32": 2e9},
        "memory_bytes": 2**30,
        "memory_bandwidth": 1e10,
        "cores": 2,
        "launch_seconds": 0.0,
        "curves": (
            *(
                KernelCurve("matmul", "float32", tuple(curve), workers=workers, threads=threads)
                for workers, threads, curve in (
                    (1, 2, [Sample((1, 64, 64, 64), 1.0)]),
                    (1, 1, [Sample((1, 64, 64, 64), 2.0)]),
                    (2, 1, [Sample((1, 64, 64, 64), 3.0)]),
                )
            ),
            KernelCurve("memory", "float32", (Sample((1000,), 5.0),), "aten.add", threads=2),
            KernelCurve("memory", "float32", (Sample((1000,), 7.0),), "aten.gelu", threads=2),
        ),
        "shared": {2: 2.0, 4: 4.0},
    }
    return Device(**{**usual, **changes})  # type: ignore[arg-type]


def matmul(shape: tuple[int, ...] = (1, 64, 64, 64), dtype: str = "float32") -> Kernel:
    return Kernel("aten.mm", "matmul", dtype, 0.0, 0.0, shape)


def test_line_goes_through_its_points() -> None:
    between = line((100, 1e-5), (10_000, 1e-4), (1_000_000, 1e-2))
    assert between(100) == pytest.approx(1e-5)
    assert between(10_000) == pytest.approx(1e-4)
    assert between(1000) == pytest.approx(math.sqrt(1e-5 * 1e-4))  # half way in logarithms


def test_line_outside_of_its_points() -> None:
    outside = line((100, 1e-5), (1_000_000, 1e-2))
    assert outside(1) == 1e-5
    assert outside(4_000_000) == pytest.approx(4e-2)


def test_line_from_nothing() -> None:
    assert line((0, 1e-4))(10_000) == 1e-4
    assert line((0, 1e-4), (100, 3e-4))(50) == pytest.approx(2e-4)


def test_line_grows() -> None:
    grows = line((16, 2e-6), (4096, 3e-6), (2**20, 1e-4), (2**24, 4e-3))
    values = [grows(2**power) for power in range(2, 30)]
    assert values == sorted(values)


def test_surface_of_a_machine_with_one_rate() -> None:
    sizes = (16, 64, 256, 1024)
    surface = Surface("matmul", [product(m, n, k) for m in sizes for n in sizes for k in sizes])
    for shape in ((48, 100, 300), (500, 32, 700), (16, 16, 16), (4096, 4096, 4096), (1, 1, 1)):
        expected = START + math.prod(shape) / RATE
        assert surface((1, *shape)) == pytest.approx(expected, rel=0.5 if expected < 2 * START else 0.15)


def test_surface_keeps_the_efficiency_of_the_nearest() -> None:
    slow = Sample((1, 4096, 16, 16), 10 * 4096 * 256 / RATE)
    surface = Surface("matmul", [product(64, 64, 64), product(256, 256, 256), product(1024, 1024, 1024), slow])
    assert surface((1, 4096, 16, 16)) == pytest.approx(slow.seconds, rel=0.1)
    assert 8 * slow.seconds < surface((1, 65536, 16, 16)) < 16 * slow.seconds


def test_curves_of_operations() -> None:
    curves = Curves(device().curves, 1, 2)
    assert curves.moved("aten.gelu", "float32", 1000) == 7.0
    assert curves.moved("aten.add_", "float32", 1000) == 5.0  # in place
    assert curves.moved("aten.never_seen", "bf16", 1000) == 5.0  # by bytes
    assert Curves(device().curves, 3, 3).moved("aten.add", "float32", 1000) is None


@pytest.mark.parametrize(
    ("workers", "threads", "seconds"), [(1, 0, 1.0), (1, 1, 2.0), (2, 0, 3.0), (4, 0, 6.0), (3, 0, 4.5)]
)
def test_workers_that_share_a_device(workers: int, threads: int, seconds: float) -> None:
    assert KernelTimes(device(threads=threads), workers).seconds(matmul()) == pytest.approx(seconds, rel=0.01)


def test_kernels_take_longer_in_a_training_where_that_was_measured() -> None:
    alone, trained = (KernelTimes(replace(device(), strain=strain)).seconds(matmul()) for strain in (1.0, 1.25))
    assert trained == pytest.approx(1.25 * alone)


def test_equal_kernels_add_up() -> None:
    times = KernelTimes(device())
    assert times.seconds(replace(matmul(), count=3)) == pytest.approx(3 * times.seconds(matmul()))


def test_threads_that_were_not_measured() -> None:
    with pytest.raises(RequestError, match="1 workers of 7 threads each, only 1 with 1, 1 with 2, 2 with 1"):
        KernelTimes(device(threads=7), 1)


def test_dtype_that_was_not_measured() -> None:
    with pytest.raises(RequestError, match=r"not measured with aten\.mm in fp16, only with matmul in float32, mem"):
        KernelTimes(device(), 1).seconds(matmul(dtype="fp16"))


def cluster(*curves: CollectiveCurve) -> Cluster:
    level = Level(name="loopback", span=8, bandwidth=1e9, latency=1e-5)
    return Cluster(name="box", nodes=(Nodes(device(), 8, 1),), levels=(level,), collectives=curves)


def curve(ranks: int, seconds: float, groups: int = 1) -> CollectiveCurve:
    return CollectiveCurve("all_reduce", ranks, 1, (Sample((1000,), seconds),), groups)


def reduced(ranks: int, size: int = 1000) -> Collective:
    return Collective("all_reduce", size, Group(ranks))


def test_collectives_that_were_measured() -> None:
    measured = cluster(curve(2, 1.0), curve(2, 3.0, groups=2), curve(4, 5.0))
    assert collective_seconds(reduced(2), measured) == 1.0
    assert collective_seconds(reduced(2), measured, workers=4) == 3.0
    assert collective_seconds(reduced(2), measured, workers=8) == 3.0
    assert collective_seconds(reduced(4), measured, workers=4) == 5.0
    assert collective_seconds(reduced(1), measured) == 0.0
    assert collective_seconds(reduced(2, 3000), measured) == pytest.approx(3.0)


def test_collectives_of_more_ranks_grow_as_the_model_says() -> None:
    measured = cluster(curve(2, 1.0), curve(4, 5.0))
    growth = modelled(reduced(8), measured) / modelled(reduced(4), measured)
    assert growth > 1
    assert collective_seconds(reduced(8), measured) == pytest.approx(5.0 * growth)


def test_collectives_that_were_not_measured() -> None:
    broadcast = Collective("broadcast", 1000, Group(2))
    assert collective_seconds(broadcast, cluster(curve(2, 1.0))) == modelled(broadcast, cluster())


def test_origins() -> None:
    measured = cluster(curve(2, 1.0))
    assert origins(measured, device(origins={"flops": "measured"})) == {
        "flops": "measured",
        "kernels": "measured",
        "collectives": "measured",
    }
    assert origins(cluster(), device(curves=())) == {}


def test_attention_of_both_kinds() -> None:
    shape = (1, 4, 64, 64, 16)
    curves = Curves(
        [
            KernelCurve("attention", "float32", (Sample(shape, seconds),), name)
            for name, seconds in (("causal", 1.0), ("dense", 2.0))
        ],
        1,
        1,
    )
    assert curves.computed("attention", "aten.sdpa", "float32", False, shape) == pytest.approx(1.0)
    assert curves.computed("attention", "dense aten.sdpa", "float32", False, shape) == pytest.approx(2.0)
