"""Training steps of one's own: several forwards, derivatives and losses by name are trained as by one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from breaking import assert_noticed
from equality import DOUBLE_TOLERANCE, check, errors, reference, resumed, train
from models import points
from pool import Pools
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import default_collate

from shardwise.errors import NotProved, WorkloadError
from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.program import Program
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.workload import Evaluation, Workload


class Layer(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.inner, self.drop = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.drop(self.inner(x))
        return output


class Classes(nn.Module):
    """Blocks between a first and a last layer, and a frozen teacher."""

    def __init__(self, drop: float = 0.2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(Layer(drop) for _ in range(3))
        self.teacher = nn.Linear(6, 4).requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.features(x))
        return output


def build(
    step: Any, model: Callable[[], nn.Module] = Classes, dtype: torch.dtype = torch.float64, **changes: Any
) -> Workload:
    return Workload(
        name="own-step",
        model=lambda: model().to(dtype),
        dataset=points(20),
        step=step,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        **{"batch_size": 8, "clip_norm": 0.5, **changes},
    )


def two_views(model: Any, batch: Any) -> dict[str, Tensor]:
    """R-drop: two passes with other dropout must agree, and both must know the class."""
    one, two = model(batch[0]), model(batch[0] * 1.1)
    classes = F.cross_entropy(one, batch[1]) + F.cross_entropy(two, batch[1])
    apart = F.kl_div(one.log_softmax(-1), two.log_softmax(-1), reduction="batchmean", log_target=True)
    return {"classes": classes, "apart": apart}


def distilled(model: Any, batch: Any) -> Tensor:
    """Parts of the model by themselves, one of them frozen."""
    with torch.no_grad():
        target = model.teacher(batch[0]).softmax(-1)
    return F.cross_entropy(model.last(model.features(batch[0])), target)


def penalized(model: Any, batch: Any) -> Any:
    """Gradient penalty on the input, with its second derivative."""
    x = batch[0].clone().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.logsumexp(-1).sum(), x, create_graph=True)
    return F.cross_entropy(output, batch[1]) + 0.1 * slope.square().sum(-1).mean()


def views() -> Workload:
    measure = lambda output, batch: (output.argmax(-1) == batch[1]).double().mean()  # noqa: E731
    return build(
        two_views,
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        evaluation=Evaluation(dataset=points(8), metric="accuracy", measure=measure),
    )


def teacher() -> Workload:
    return build(distilled)


def penalty() -> Workload:
    return build(penalized)


def counted(model: Any, batch: Any) -> Tensor:
    """Mean over the samples of two classes, of which some microbatches have none."""
    labels = batch[1].where(batch[1] > 1, -100)
    return F.cross_entropy(model(batch[0]), labels)


class Tempered(nn.Module):
    """Step with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([1.5]))

    def forward(self, model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]) * self.temperature, batch[1]) + model.first.weight.square().mean()


def weighted() -> Workload:
    return build(counted, weight=lambda batch: (batch[1] > 1).sum())


def tempered() -> Workload:
    return build(Tempered().double())


class Slow(Classes):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slow", self.last.weight.detach().clone())


def following(model: Any, batch: Any) -> Any:
    """The last layer must agree with a moving average of itself."""
    with torch.no_grad():
        model.slow.lerp_(model.last.weight, 0.1)
    features = model.features(batch[0])
    return (
        F.cross_entropy(model.last(features), batch[1])
        + (model.last(features) - features @ model.slow.T).square().mean()
    )


def average() -> Workload:
    return build(following, Slow)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
        self.critic = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def against_each_other(model: Any, batch: Any) -> dict[str, Tensor]:
    """A generator and its critic: each loss trains one of them and takes the other as it is."""
    real, noise = batch[0][:, :3], batch[0][:, 3:]
    made = model.generator(noise)
    critic = F.softplus(-model.critic(real)).mean() + F.softplus(model.critic(made.detach())).mean()
    fixed = {name: weight.detach() for name, weight in model.critic.named_parameters()}
    return {"critic": critic, "generator": F.softplus(-functional_call(model.critic, fixed, made)).mean()}


def adversarial() -> Workload:
    rates = {"generator.*": {"lr": 0.02}, "critic.*": {"lr": 0.05, "betas": (0.5, 0.9)}}
    return build(against_each_other, Both, groups=rates)


CASES = [
    *((average, strategy) for strategy in ("dp=2", "fsdp=2", "tp=2")),
    *((adversarial, strategy) for strategy in ("dp=2", "fsdp=2", "tp=2", "pp=2")),
    (adversarial, "pp=2,schedule=interleaved"),  # one of its losses is ready before the last stage
    *((made, strategy) for made in (views, teacher, penalty) for strategy in ("dp=2", "fsdp=2")),
    *((made, strategy) for made in (views, teacher) for strategy in ("tp=2", "pp=2", "dp=2,tp=2")),
    *((weighted, strategy) for strategy in ("dp=2,microbatches=2", "fsdp=2,microbatches=2", "tp=2,microbatches=4")),
    *((tempered, strategy) for strategy in ("dp=2", "fsdp=2", "tp=2", "pp=2")),
    (views, "dp=2,fsdp=2"),
    (views, "tp=2,pp=2,recompute=full"),
    (views, "dp=2,microbatches=2,recompute=full"),
    (teacher, "fsdp=2,microbatches=2,recompute=full"),
    (teacher, "fsdp=2,zero=1"),
    (penalty, "dp=2,recompute=full"),
    (penalty, "fsdp=2,microbatches=2"),
]


@pytest.mark.parametrize(("made", "strategy"), CASES)
def test_every_step_equals_one_process(workers: Pools, made: Callable[[], Workload], strategy: str) -> None:
    check(workers, made, strategy)


def test_a_second_derivative_that_is_not_averaged_is_noticed(workers: Pools) -> None:
    once = lambda: mock.patch.object(ModuleEngine, "_gradient_of", lambda _, loss, scale: scale.to(loss.dtype))  # noqa: E731
    assert_noticed(workers, penalty, "dp=2", once)


def narrow() -> Workload:
    return build(two_views, lambda: Classes(0.0), torch.float32, precision="bf16", collate=single)


def single(samples: list[Any]) -> list[Tensor]:
    x, y = default_collate(samples)
    return [x.float(), y]


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_the_model_is_narrow_and_the_rest_of_the_step_is_not(workers: Pools, strategy: str) -> None:
    """All compute the model in bfloat16 and the losses in float32: the difference is that of rounding."""
    expected = reference(workers, narrow, strategy, 1)
    found = errors(train(workers, narrow, strategy, 1), expected)
    assert found["loss"][0] < 2e-3
    assert found["gradient"][0] < 0.1


def proved(made: Callable[[], Workload], strategy: str) -> list[Any]:
    program = Program.build(made(), Strategy.parse(strategy))
    found = prove_first_step(program)
    program.step_share(next(program.loader().shares(0)))
    return [found.proved, found.reason, found.gradient_error, {k: float(v) for k, v in program.losses.items()}]


@pytest.mark.parametrize(
    ("made", "strategy"),
    [(views, "dp=2"), (views, "tp=2"), (views, "pp=2"), (penalty, "dp=2"), (penalty, "fsdp=2"), (teacher, "fsdp=2")],
)
def test_the_first_step_is_proved(workers: Pools, made: Callable[[], Workload], strategy: str) -> None:
    (_, _, _, alone) = proved(made, "single")
    for holds, reason, error, losses in workers(2, proved, made, strategy):
        assert (holds, reason) == (True, None)
        assert error < DOUBLE_TOLERANCE
        assert losses == pytest.approx(alone)


def by_another(model: Any, batch: Any) -> Any:
    return (model(batch[0]) - BESIDE(batch[0])).square().mean()


BESIDE = nn.Linear(6, 4).double()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda model, batch: model(batch[0]).mean(0).square().sum(), "is no mean over samples"),
        (by_another, "depends on a trained tensor"),
    ],
)
def test_a_wrong_step_is_not_proved(workers: Pools, step: Any, said: str) -> None:
    made = build(step)
    with pytest.raises(NotProved, match=said):
        workers(2, proved, lambda: made, "dp=2")


def stepped(made: Workload, strategy: str, steps: int = 1) -> None:
    program = Program.build(made, Strategy.parse(strategy))
    for share in itertools.islice(program.loader().shares(0), steps):
        program.step_share(share)


def backward(model: Any, batch: Any) -> Any:
    loss = model(batch[0]).square().mean()
    loss.backward()
    return loss


def updating(model: Any, batch: Any) -> Any:
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model(batch[0]).square().mean()


def clearing(model: Any, batch: Any) -> Any:
    model.zero_grad()
    return model(batch[0]).square().mean()


def averaging(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        model.teacher.bias.lerp_(model.last.bias, 0.1)
    return model(batch[0]).square().mean()


@pytest.mark.parametrize("strategy", ["single", "dp=2", "fsdp=2", "tp=2"])
def test_a_step_that_changes_parameters_is_refused(workers: Pools, strategy: str) -> None:
    with pytest.raises(WorkloadError, match=r"changes parameter 'teacher.bias'"):
        workers(Strategy.parse(strategy).workers, stepped, build(averaging), strategy)


@pytest.mark.parametrize("strategy", ["single", "tp=2"])
@pytest.mark.parametrize(
    ("step", "said"),
    [
        (backward, "step of workload 'own-step' calls backward"),
        (updating, "step of workload 'own-step' calls step"),
        (clearing, "step of workload 'own-step' calls zero_grad"),
        (lambda model, batch: model(batch[0]).mean().detach(), "returns losses without a gradient"),
        (lambda model, batch: batch[0].mean(), "returns losses without a gradient"),
        (lambda model, batch: None, "result of step of workload 'own-step' is a NoneType"),
        (lambda model, batch: {"a": model(batch[0])}, r"loss 'a' of workload 'own-step' has shape \(8, 4\)"),
        (lambda model, batch: {}, "the result of step of workload 'own-step' is an empty dict"),
    ],
)
def test_a_step_that_does_something_else_is_refused(workers: Pools, step: Any, said: str, strategy: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        workers(Strategy.parse(strategy).workers, stepped, build(step), strategy)


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2"])
def test_derivatives_are_refused_where_a_step_is_traced(workers: Pools, strategy: str) -> None:
    with pytest.raises(RuntimeError, match=r"takes a derivative itself \(torch.autograd.grad\); use dp or fsdp"):
        workers(2, stepped, penalty(), strategy)


class Normed(Classes):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def test_a_second_derivative_over_replicas_is_refused(workers: Pools) -> None:
    workers(1, stepped, build(penalized, Normed), "single")
    with pytest.raises(WorkloadError, match="a second derivative is taken through a batch norm"):
        workers(2, stepped, build(penalized, Normed), "dp=2")


class Seldom:
    """Gradient penalty in every other pass, as in StyleGAN."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, batch: Any) -> Tensor:
        self.calls += 1
        return penalized(model, batch) if self.calls % 8 == 0 else F.cross_entropy(model(batch[0]), batch[1])


def test_derivatives_in_some_passes_are_refused_under_fsdp(workers: Pools) -> None:
    """Take derivatives where the blocks of the model are gathered one by one; dp takes them."""
    workers(2, stepped, build(Seldom(), batch_size=2), "dp=2", 9)
    with pytest.raises(WorkloadError, match="takes derivatives in some passes only"):
        workers(2, stepped, build(Seldom(), batch_size=2), "fsdp=2", 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"whole_batch": True}, "whole_batch and step of workload 'own-step' exclude each other"),
        ({"evaluation": Evaluation(dataset=[], metric="m", measure=torch.sub)}, "evaluation .* needs inputs and loss"),
        ({"step": None}, "workload 'own-step' has no inputs: give inputs and loss, or a step"),
        ({"step": "loss"}, "step of workload 'own-step' must be a function, not 'loss'"),
    ],
)
def test_a_workload_that_cannot_be_meant_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        replace(build(distilled), **changes)


def test_a_loss_with_parameters_beside_a_step_is_refused() -> None:
    made = build(distilled, loss=nn.Linear(4, 1), inputs=lambda batch: batch[0])
    with pytest.raises(WorkloadError, match="has parameters, which its step does not train"):
        Program.build(made, Strategy())


@pytest.mark.parametrize("strategies", [("dp=2", "tp=2"), ("pp=2", "fsdp=2")])
def test_it_goes_on_under_another_strategy(workers: Pools, tmp_path: Path, strategies: tuple[str, str]) -> None:
    expected = reference(workers, views, "single", 3).losses
    found = [
        workers(2, resumed, views, tmp_path, each, steps)[0] for each, steps in zip(strategies, (2, 1), strict=True)
    ]
    assert found[0] + found[1] == pytest.approx(expected, rel=DOUBLE_TOLERANCE)
