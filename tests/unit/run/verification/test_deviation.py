from __future__ import annotations

import math

import pytest
import torch

from shardwise.run.verification.deviation import Deviation, deviation


def test_a_tensor_is_held_against_its_own_size() -> None:
    expected = {"large": torch.full((10,), 100.0), "small": torch.full((10,), 90.0)}
    actual = {**expected, "large": expected["large"] * 1.01}
    found = deviation(actual, expected)
    assert found.tensor == "large"
    assert found.error == pytest.approx(0.01, rel=1e-4)


def test_a_tensor_that_is_zero_but_for_rounding_is_held_against_the_others() -> None:
    expected = {"bias": torch.full((4,), 1e-12), "weight": torch.ones(4, 4)}
    found = deviation({**expected, "bias": -expected["bias"]}, expected)
    assert found.error < 1e-11


def test_elements_that_do_not_count() -> None:
    expected = {"weight": torch.ones(4)}
    actual = {"weight": torch.tensor([1.0, 1.0, 1.0, 5.0])}
    assert deviation(actual, expected).error > 1
    assert deviation(actual, expected, counted={"weight": torch.tensor([True, True, True, False])}).error == 0


@pytest.mark.parametrize(
    ("actual", "why"),
    [
        ({}, "is missing in parallel"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "is there in parallel only"),
        ({"a": torch.ones(3)}, "has shape (3,), not (2,)"),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far(actual: dict[str, torch.Tensor], why: str) -> None:
    found = deviation(actual, {"a": torch.ones(2)})
    assert found.error == math.inf
    assert found.why == why


def test_not_a_number_proves_nothing() -> None:
    nan, one = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])
    for actual, expected, why in (
        (nan, nan, "on one worker and in parallel: that proves nothing"),
        (nan, one, "in parallel only"),
        (one, nan, "on one worker only"),
    ):
        found = deviation({"a": actual}, {"a": expected})
        assert found.error == math.inf
        assert found.why.endswith(why)


def test_infinities_are_equal_or_not() -> None:
    mask = torch.tensor([-math.inf, 0.0])
    assert deviation({"mask": mask}, {"mask": mask.clone()}).error == 0
    assert deviation({"mask": -mask}, {"mask": mask}).error == math.inf


def test_integers_are_equal_or_not() -> None:
    counts = {"steps": torch.tensor(3)}
    assert deviation(counts, counts).error == 0
    assert deviation({"steps": torch.tensor(4)}, counts).error == math.inf


def test_the_larger_of_two() -> None:
    assert Deviation(0.1, "a") | Deviation(0.2, "b") == Deviation(0.2, "b")
    assert Deviation(0.1, "a") | Deviation(0.1, "b") == Deviation(0.1, "a")


def test_complex_tensors_are_compared_by_both_parts() -> None:
    expected = {"filter": torch.full((8,), 3 + 4j)}
    assert deviation({"filter": torch.full((8,), 3 + 4.05j)}, expected).error == pytest.approx(0.01, rel=1e-3)
    assert deviation(dict(expected), expected).error == 0
