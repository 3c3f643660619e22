"""A profile's answers about ranges of its segments are those found by hand."""

from __future__ import annotations

import pytest

from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Layer, LayerPass, Parameter, Profile, Segment, Value

MATMUL = Kernel("aten.mm", "matmul", "float32", 8.0, 24.0, (1, 2, 2, 1))
LAYER = Layer(forward=LayerPass((MATMUL,)), backward=LayerPass((MATMUL, MATMUL)), inside=10)
VALUES = (
    Value(4, 40, 0, (1,), saved=(1,)),
    Value(5, 50, 0, (1, 3)),  # a connection over link 2
    Value(6, 60, 1, (2,), saved=(1, 2)),
    Value(7, 70, 2, (3,)),
)
PARAMETERS = (
    Parameter("a", (3, 2), 4, (0,)),
    Parameter("tied", (5,), 2, (0, 3)),
    Parameter("b", (), 4, (2,), trained=False),
)
PROFILE = Profile(
    name="chain",
    tp=1,
    sp=0,
    microbatch=1,
    precision="float32",
    device="gpu",
    batch_size=4,
    segments=(Segment(LAYER), Segment(LAYER, 9), Segment(LAYER, 6), Segment(LAYER, 12)),
    parameters=PARAMETERS,
    values=VALUES,
)


def test_values_that_live() -> None:
    skip = VALUES[1]
    assert PROFILE.live == ((), VALUES[:2], (skip, VALUES[2]), (skip, VALUES[3]), ())


@pytest.mark.parametrize(
    ("first", "end", "crossing"),
    [
        (0, 1, VALUES[:2]),
        (1, 2, VALUES[:3]),  # one passes: used here and behind
        (2, 3, (VALUES[2], VALUES[3])),  # the connection goes past it
        (2, 4, (VALUES[1], VALUES[2])),
        (0, 4, ()),
    ],
)
def test_values_that_cross(first: int, end: int, crossing: tuple[Value, ...]) -> None:
    assert tuple(PROFILE.crossing(first, end)) == crossing


def test_parameters() -> None:
    assert [(parameter.elements, parameter.bytes) for parameter in PARAMETERS] == [(6, 24), (5, 10), (1, 4)]
    assert PROFILE.within(0, 1) == (0, 1)
    assert PROFILE.within(1, 2) == ()
    assert PROFILE.within(2, 4) == (1, 2)
    assert PROFILE.trained == (0, 1)
    assert PROFILE.largest == 24


def test_kept_bytes_count_where_they_are_kept_first() -> None:
    # 10 inside each link; 40 and 60 are kept by link 1
    assert PROFILE.saved == (0, 10, 120, 130, 140)


def test_flops() -> None:
    assert PROFILE.flops == 4 * 3 * 8.0
