"""A strategy that cannot work for a model is refused before any worker starts, in one line that says what would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from steps import workload
from torch import Tensor, nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.check import check_strategy
from shardwise.strategy import Strategy
from shardwise.workload.workload import Evaluation

X = torch.randn(8, 12)


class Heads(nn.Module):
    def __init__(self, heads: int = 6, keys: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, heads * 4), nn.Linear(24, keys * 4), nn.Linear(24, keys * 4)
        self.out = nn.Linear(heads * 4, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        output: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return output


TOKENS = torch.randn(8, 5, 24)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 6))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Heads(), Heads()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        output: Tensor = x + self.second(x)
        return output


def odd() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 18), nn.ReLU(), nn.Linear(18, 6))


def check(model: Callable[[], nn.Module], strategy: str, x: Tensor = X, **changes: object) -> None:
    check_strategy(workload(model, x, **changes), Strategy.parse(strategy))


@pytest.mark.parametrize("strategy", ["single", "dp=2", "tp=2", "tp=3", "tp=6", "pp=2", "tp=2,pp=2", "fsdp=2,tp=2"])
def test_what_works_passes(strategy: str) -> None:
    check(mlp, strategy)


@pytest.mark.parametrize("strategy", ["tp=2", "tp=3", "tp=6", "tp=2,sp=1"])
def test_heads_that_divide(strategy: str) -> None:
    check(Heads, strategy, TOKENS)


def test_fewer_key_heads_than_workers() -> None:
    check(lambda: Heads(6, 2), "tp=6", TOKENS)
    check(lambda: Heads(6, 1), "tp=3", TOKENS)


class Five(Heads):
    """Five heads, which no usual degree divides, beside a perceptron."""

    def __init__(self, wide: int) -> None:
        super().__init__(5, 1)
        self.up, self.down = nn.Linear(24, wide), nn.Linear(wide, 24)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.up(super().forward(x)))
        return output


@pytest.mark.parametrize("strategy", ["tp=2", "tp=3", "tp=2,sp=1"])
def test_heads_that_nothing_divides_leave_the_other_layers(strategy: str) -> None:
    check(lambda: Five(96), strategy, TOKENS)


def test_heads_that_nothing_divides_are_named_where_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.parallel.check.LEAST_SHARED", 0.99)
    with pytest.raises(StrategyError, match="does not divide the 5 attention heads: no tensor degree fits this model"):
        check(lambda: Five(96), "tp=3", TOKENS)


@pytest.mark.parametrize(
    ("model", "strategy", "x", "message"),
    [
        (Heads, "tp=4", TOKENS, "tp=4 does not divide the 6 attention heads: use tp=2 or 3 or 6"),
        (odd, "tp=4", X[:, :10], "tp=4 does not divide 0.weight (features 18 and 10): use tp=2 or 3 or 6"),
        (lambda: nn.Linear(12, 7), "tp=8", X, "tp=8 does not divide weight (features 7 and 12)"),
        (
            lambda: nn.LSTM(12, 7, proj_size=5), "tp=2", X,
            "tp=2 does not divide anything: no layer of the model can be cut: no tensor degree fits this model, "
            "use dp, fsdp or pp",
        ),
        (mlp, "pp=4", X, "pp=4: the model's graph can be cut into 2 stages at most: use pp=2 or fewer"),
        (lambda: nn.Linear(12, 12), "pp=2", X, "can be cut into 1 stages at most: use dp, fsdp or tp"),
        (
            mlp, "pp=2,schedule=interleaved", X,
            "pp=2 with 2 stages each: the model's graph can be cut into 2 stages at most: use schedule=1f1b",
        ),
        (
            lambda: nn.Sequential(*(nn.Linear(12, 12) for _ in range(5))), "pp=2,schedule=interleaved,stages=3", X,
            "can be cut into 5 stages at most: use stages=2",
        ),
        (TwoHeads, "pp=9", TOKENS, "can be cut into 8 stages at most: use pp=8 or fewer"),
        (TwoHeads, "tp=2,pp=8", TOKENS, "can be cut into 7 stages at most"),  # layers share exchanges
        (mlp, "dp=3,tp=2", X, "batch_size=8 does not divide by the 3 replicas"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused(model: Callable[[], nn.Module], strategy: str, x: Tensor, message: str) -> None:
    def loss(output: Tensor | tuple[Tensor, ...], batch: object) -> Tensor:
        return (output if isinstance(output, Tensor) else output[0]).mean()

    with pytest.raises(StrategyError) as caught:
        check(model, strategy, x, loss=loss)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_evaluation_without_some_layers_has_fewer_places() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.extra = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            output: Tensor = self.b(h) + (self.extra(h) if self.training else 0)
            return output

    check(Auxiliary, "pp=3")
    evaluation = Evaluation(
        dataset=workload(mlp, X).dataset, metric="mean", measure=lambda output, batch: output.mean()
    )
    check(Auxiliary, "pp=2", evaluation=evaluation)
    with pytest.raises(StrategyError, match="2 stages at most: use pp=2 or fewer"):
        check(Auxiliary, "pp=3", evaluation=evaluation)


def test_what_cannot_be_traced_is_said() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.a(x) if x.sum() > 0 else self.a(-x)
            return output

    with pytest.raises(WorkloadError, match="cannot be traced"):
        check(Branch, "tp=2")
    with pytest.raises(WorkloadError, match=r"has shape \(8, 6\): must be a scalar"):
        check(mlp, "tp=2", loss=lambda output, batch: output)
    check(Branch, "dp=2")  # it needs no graph


def test_random_state_and_modes_are_as_before() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check(lambda: nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5), nn.Linear(12, 12)), "tp=2,pp=2")
    assert torch.rand(1) == expected
