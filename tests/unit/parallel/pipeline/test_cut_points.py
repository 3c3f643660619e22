"""Where a step may be cut, and where it is best cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from steps import step_of, workload
from torch import Tensor, nn

from shardwise.parallel.check import split
from shardwise.parallel.pipeline.cut_points import CutPoint, calls, common, find_cut_points, positions, ranges, uses
from shardwise.parallel.pipeline.subgraphs import compiled, sections
from shardwise.parallel.tensor.partitioner import LocalGraph
from shardwise.splitting.chain_partition import balanced

X = torch.randn(4, 8)


def whole(model: nn.Module, x: Tensor = X, *, training: bool = True) -> LocalGraph:
    _, step = step_of(workload(lambda: model, x), training)
    return split(step, 1, frozenset(name for name, _ in model.named_parameters()))[0]


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


class Skip(nn.Module):
    """A wide middle, a connection over it, a mask from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.down, self.b = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype)
        h = self.a(x * mask)
        output: Tensor = self.b(self.down(F.gelu(self.up(h))) + h) * mask
        return output


def test_places_are_before_the_use_of_a_parameter_with_the_least_to_send() -> None:
    model = Skip()
    found = find_cut_points(whole(model), names(model))
    assert [cut_point.use for cut_point in found] == [("up.weight", 0), ("down.weight", 0), ("b.weight", 0)]
    rows = len(X) * 4
    # h; h and the wide middle; the sum: the mask is computed again where it is needed
    assert [cut_point.bytes for cut_point in found] == [8 * rows, (8 + 32) * rows, 8 * rows]
    assert [cut_point.values for cut_point in found] == [1, 2, 1]


def test_uses_are_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.a(self.b(self.a(x)))
            return output

    local = whole(Twice())
    found = [use for each in uses(local.graph, local.step.tensors, ["a.weight", "b.weight"]).values() for use in each]
    assert found == [("a.weight", 0), ("b.weight", 0), ("a.weight", 1)]


def test_a_batch_norm_that_is_used_twice_is_not_cut_apart() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.c(self.norm(self.b(self.norm(self.a(x)))))
            return output

    model = Normalised()
    assert [cut_point.use[0] for cut_point in find_cut_points(whole(model), names(model))] == [
        "norm.weight",
        "c.weight",
    ]


def test_only_places_that_an_evaluation_has_too() -> None:
    training = [
        CutPoint(("a", 0), 3, 1, 1),
        CutPoint(("only", 0), 4, 1, 1),
        CutPoint(("b", 0), 6, 1, 1),
        CutPoint(("c", 0), 9, 1, 1),
    ]
    evaluation = [CutPoint(("b", 0), 2, 1, 1), CutPoint(("a", 0), 5, 1, 1), CutPoint(("c", 0), 7, 1, 1)]
    assert [cut_point.use[0] for cut_point in common(training, evaluation)] == ["a", "c"]
    assert common(training, []) == []


def test_other_shapes_are_cut_alike() -> None:
    model = Skip()
    cut = [("up.weight", 0), ("b.weight", 0)]
    for x in (X, X[:1]):
        for training in (True, False):
            local = whole(model, x, training=training)
            found = positions(local, cut, names(model))
            sequence = calls(local.graph)
            parts = ranges(local, found)
            assert sum(map(len, parts)) == len(sequence)
            assert sum("linear" in str(sequence[i].target) for i in parts[1]) == 2


@pytest.mark.parametrize("seed", range(20))
def test_balanced_is_the_best(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    count, parts = 7, 2 + seed % 4
    costs = torch.randint(1, 20, (count,), generator=draw).tolist()
    sends = torch.randint(0, 5, (count - 1,), generator=draw).tolist()
    for speeds in ([1] * parts, torch.randint(1, 5, (parts,), generator=draw).tolist()):

        def worst(starts: tuple[int, ...], speeds: list[int] = speeds) -> float:
            bounds = pairwise([0, *starts, count])
            entry = [0, *sends]
            output: float = max(
                (sum(costs[a:b]) + entry[a]) / speed for (a, b), speed in zip(bounds, speeds, strict=True)
            )
            return output

        found = balanced(costs, sends, parts, speeds)
        assert len(found) == parts - 1
        assert worst(tuple(found)) == min(worst(each) for each in combinations(range(1, count), parts - 1))


@pytest.mark.parametrize("seed", range(10))
def test_balanced_with_slow_links_is_the_best(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    count, parts = 7, 2 + seed % 4
    costs = torch.randint(1, 20, (count,), generator=draw).tolist()
    sends = torch.randint(0, 5, (count - 1,), generator=draw).tolist()
    slower = torch.randint(1, 9, (parts - 1,), generator=draw).tolist()

    def worst(starts: tuple[int, ...]) -> float:
        bounds = pairwise([0, *starts, count])
        arrives = [0, *(sends[start - 1] * factor for start, factor in zip(starts, slower, strict=True))]
        output: float = max(sum(costs[a:b]) + more for (a, b), more in zip(bounds, arrives, strict=True))
        return output

    found = balanced(costs, sends, parts, slower=slower)
    assert worst(tuple(found)) == min(worst(each) for each in combinations(range(1, count), parts - 1))


def narrow(parameter: Tensor) -> Tensor:
    raise AssertionError("a step in float32 is given no copies")


def test_sections_compute_what_the_module_computes() -> None:
    torch.manual_seed(0)
    model = Skip()
    local = whole(model)
    parameters = dict(model.named_parameters())
    x = X.clone()
    parts = sections(local, positions(local, [("up.weight", 0), ("down.weight", 0)], names(model)))
    given = {local.step.leaves[0]: x}
    values: dict[object, Tensor] = {}
    for section in parts:
        arguments: list[Tensor] = [parameters[name] for name in section.tensors]
        arguments += [given[node.name] for node in section.given] + [values[node] for node in section.inputs]
        values.update(zip(section.outputs, compiled(section, local)(narrow, *arguments), strict=True))
    loss = values[parts[-1].outputs[0]]
    torch.testing.assert_close(loss, model(x).square().mean())
    assert [len(section.inputs) for section in parts] == [0, 1, 2]


def test_a_received_value_is_not_overwritten() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            output: Tensor = self.b(torch.relu_(h))
            return output

    model = InPlace()
    local = whole(model)
    second = sections(local, [1])[1]
    received = torch.randn(4, 8)
    before = received.clone()
    compiled(second, local)(narrow, model.b.weight, model.b.bias, received)
    torch.testing.assert_close(received, before)
