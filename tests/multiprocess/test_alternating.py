"""Turns of a training step: alternating updates are those of a loop written by hand, and of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from breaking import assert_noticed
from equality import DOUBLE_TOLERANCE, assert_equal, check, reference, resumed, shares_of, train
from models import points
from pool import Pools
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate

from shardwise.errors import NotFinite, NotProved, StrategyError, WorkloadError
from shardwise.parallel.data import module_engine
from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.program import Program
from shardwise.run.training.guard import Guard
from shardwise.run.training.job import SKIP, STOP
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.turns import Turn
from shardwise.workload.workload import Workload


class GAN(nn.Module):
    """Two networks, and a hook that doubles one gradient."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 3))
        self.critic = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 1))
        last = self.critic[3]
        assert isinstance(last, nn.Linear)
        last.weight.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]


def judged(model: Any, batch: Any) -> dict[str, Tensor]:
    """Critic's losses. Nothing is detached: the gradient would reach the generator if the turn let it."""
    real, noise = batch[0][:, :3], batch[0][:, 3:]
    return {
        "real": F.softplus(-model.critic(real)).mean(),
        "made": F.softplus(model.critic(model.generator(noise))).mean(),
    }


def made(model: Any, batch: Any) -> Tensor:
    loss: Tensor = F.softplus(-model.critic(model.generator(batch[0][:, 3:]))).mean()
    return loss


TURNS = (Turn(step=judged, parameters=("critic.*",)), Turn(step=made, parameters=("generator.*",), every=2))


def two_adams(groups: Any) -> list[torch.optim.Optimizer]:
    critic, generator = groups
    return [torch.optim.Adam([critic], lr=0.05, betas=(0.5, 0.9)), torch.optim.Adam([generator], lr=0.02)]


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def clamped(name: str, parameter: Tensor) -> None:
    if name.startswith("critic"):
        parameter.clamp_(-0.4, 0.4)


def build(drop: float = 0.0, **changes: Any) -> Workload:
    given = {
        "model": lambda: GAN(drop).double(),
        "step": TURNS,
        "optimizer": two_adams,
        "schedule": falling,
        "clip_norm": 0.3,
        "average": 0.9,
        **changes,
    }
    return Workload(name="turns", dataset=points(32), batch_size=8, after_step=clamped, **given)


def dropping() -> Workload:
    return build(0.3)


def by_class(model: Any, batch: Any) -> Tensor:
    """Mean over the samples by the number of their class, of both networks."""
    loss = F.softplus(-model.critic(model.generator(batch[0][:, 3:])))[:, 0]
    mean: Tensor = (loss * batch[1]).sum() / batch[1].sum()
    return mean


def weighted() -> Workload:
    turns = [Turn(step=by_class, parameters=(pattern,)) for pattern in ("critic.*", "generator.*")]
    return build(step=turns, weight=lambda batch: batch[1].sum())


class Normed(GAN):
    """Generator with statistics of the batch, and a parameter of the critic that few samples need."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        if norm:
            self.generator.insert(0, nn.BatchNorm1d(3))
        self.critic.register_parameter("few", nn.Parameter(torch.ones(())))


def normed() -> Workload:
    turns = [Turn(step=with_norm_parameter, parameters=("critic.*",)), TURNS[1]]
    return build(model=lambda: Normed(norm=True).double(), step=turns)


def with_norm_parameter(model: Any, batch: Any) -> Tensor:
    loss: Tensor = sum(judged(model, batch).values()) + model.critic.few.square()
    return loss


def seldom() -> Workload:
    return build(
        model=lambda: Normed(norm=False).double(),
        step=[Turn(step=for_large, parameters=("critic.*",)), TURNS[1]],
        clip_norm=None,
    )


def for_large(model: Any, batch: Any) -> Tensor:
    """Need a parameter of the critic for large samples alone, of which some replicas have none."""
    large = batch[0][:, 0] > 1.2
    loss: Any = sum(judged(model, batch).values())
    if large.any():
        loss = loss + (model.critic.few.square() * large).mean()
    assert isinstance(loss, Tensor)
    return loss


def penalized() -> Workload:
    turns = [Turn(step=flat, parameters=("critic.*",)), TURNS[1]]
    return build(step=turns)


def flat(model: Any, batch: Any) -> dict[str, Tensor]:
    """Critic's losses with a gradient penalty on what the generator makes."""
    x = model.generator(batch[0][:, 3:]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.critic(x).sum(), x, create_graph=True)
    return {**judged(model, batch), "penalty": slope.square().sum(-1).mean()}


def by_hand(workload: Workload, model: Any, batches: list[Any]) -> tuple[list[torch.optim.Optimizer], Any]:
    """Train as one writes it in plain torch, and return the two optimizers and the averages."""
    parts = [model.critic, model.generator]
    optimizers = two_adams([{"params": [*part.parameters()]} for part in parts])
    schedules = [falling(optimizer) for optimizer in optimizers]
    means = [AveragedModel(part, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for part in parts]  # type: ignore[no-untyped-call]
    for step, batch in enumerate(batches):
        for number, part in enumerate(parts):
            if number == 1 and step % 2:
                continue
            loss = made(model, batch) if number else sum(judged(model, batch).values())
            gradients = torch.autograd.grad(loss, [*part.parameters()])  # type: ignore[arg-type]
            for parameter, gradient in zip(part.parameters(), gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(part.parameters(), 0.3)
            optimizers[number].step()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    clamped(name, parameter)
            means[number].update_parameters(part)
        for schedule in schedules:
            schedule.step()
    return optimizers, means


def compare_by_hand(steps: int = 5) -> None:
    """Compare parameters, optimizer states and averages with those of the loop by hand."""
    program = Program.build(build(), Strategy())
    model = GAN().double()  # with a hook of its own
    model.load_state_dict({k: v.clone() for k, v in program.engine.module.state_dict().items()})
    shares = [share.microbatches[0].data for share in shares_of(program, steps)]
    optimizers, means = by_hand(program.workload, model, copy.deepcopy(shares))
    for share in shares_of(Program.build(build(), Strategy()), steps):
        program.step_share(share)
    found = {piece.name: piece.local for piece in program.pieces()}
    for number, network in enumerate(("critic", "generator")):
        for name, parameter in getattr(model, network).named_parameters():
            expected = {
                f"model/{network}.{name}": parameter.detach(),
                f"average/{network}.{name}": means[number].module.get_parameter(name).detach(),
                **{f"optimizer/{network}.{name}/{k}": v for k, v in optimizers[number].state[parameter].items()},
            }
            assert expected.keys() <= found.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key].to(value), value, rtol=1e-12, atol=1e-14, msg=key)
    rates = [group["lr"] for group in program.optimizer.param_groups]
    assert rates == [optimizer.param_groups[0]["lr"] for optimizer in optimizers]


def test_one_process_trains_as_a_loop_by_hand() -> None:
    compare_by_hand()


@contextmanager
def leaking(*_: Any) -> Iterator[None]:
    """Let every turn compute the gradients of all parameters."""
    yield


def test_a_gradient_that_leaks_into_another_turn_is_noticed() -> None:
    with mock.patch.object(module_engine, "trained_alone", leaking), pytest.raises(AssertionError, match="model/"):
        compare_by_hand()


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("strategy", ["dp=2", "dp=4"])
def test_replicas_train_as_one_process(workers: Pools, strategy: str, steps: int) -> None:
    check(workers, build, strategy, steps)


@pytest.mark.parametrize(
    ("factory", "strategy"),
    [
        (dropping, "dp=2"),
        (dropping, "dp=2,microbatches=2"),
        (weighted, "dp=2"),
        (build, "dp=2,shares=3:1"),
        (normed, "dp=2"),
        (penalized, "dp=2"),
        (seldom, "dp=2"),
        (seldom, "dp=4,microbatches=2"),
    ],
)
def test_other_steps_equal_one_process(workers: Pools, factory: Callable[[], Workload], strategy: str) -> None:
    check(workers, factory, strategy)


def test_each_turn_draws_its_own_masks() -> None:
    """A step that saw one mask in both turns would drop the same neurons for both."""
    seen: list[Tensor] = []

    def look(model: Any, batch: Any) -> Tensor:
        seen.append(model.generator[2](torch.ones(8, 16).double()))
        return made(model, batch) + sum(judged(model, batch).values())

    turns = [Turn(step=look, parameters=(pattern,)) for pattern in ("critic.*", "generator.*")]
    stepped(build(0.5, step=turns), "single")
    assert not torch.equal(*seen)


def test_a_turn_that_is_not_averaged_is_noticed(workers: Pools) -> None:
    assert_noticed(workers, build, "dp=2", second_not_averaged)


def second_not_averaged() -> Any:
    whole = ModuleEngine._gradient_of

    def wrong(self: ModuleEngine, loss: Tensor, scale: Tensor) -> Tensor:
        return whole(self, loss, scale) / (1 + self.position.turn * (self._mesh.world is not None))

    return mock.patch.object(ModuleEngine, "_gradient_of", wrong)


def stepped(workload: Workload, strategy: str, steps: int = 1) -> list[dict[str, float]]:
    """Losses by name of each step."""
    program, found = Program.build(workload, Strategy.parse(strategy)), []
    for share in shares_of(program, steps):
        loss = float(program.step_share(share))
        found.append({name: float(value) for name, value in program.losses.items()})
        assert loss == pytest.approx(sum(found[-1].values()))
    return found


def test_losses_are_told_by_name_in_the_steps_that_take_them(workers: Pools) -> None:
    expected = stepped(build(), "single", 3)
    assert [[*each] for each in expected] == [["real", "made", "turn 2"], ["real", "made"], ["real", "made", "turn 2"]]
    for found in workers(2, stepped, build(), "dp=2", 3):
        assert [[*each] for each in found] == [[*each] for each in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=DOUBLE_TOLERANCE)


def test_two_turns_with_a_loss_of_one_name_are_refused() -> None:
    turns = [Turn(step=judged, parameters=(pattern,)) for pattern in ("critic.*", "generator.*")]
    with pytest.raises(WorkloadError, match="two turns of workload 'turns' have a loss 'real'"):
        stepped(build(step=turns), "single")


def test_after_step_follows_the_update_of_each_turn() -> None:
    told: list[str] = []
    turns = (Turn(step=noting(told, judged), parameters=("critic.*",)), Turn(step=made, parameters=("generator.*",)))
    workload = Workload(
        name="turns",
        model=lambda: GAN().double(),
        dataset=points(8),
        batch_size=8,
        step=turns,
        optimizer=two_adams,
        after_step=lambda name, _: told.append(name.partition(".")[0]),
    )
    stepped(workload, "single")
    assert told == ["step", *["critic"] * 4, *["generator"] * 4]


def noting(told: list[str], step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def noted(model: Any, batch: Any) -> Any:
        told.append("step")
        return step(model, batch)

    return noted


@pytest.mark.parametrize("strategies", [("dp=2", "single"), ("single", "dp=2")])
def test_it_goes_on_between_the_steps_of_a_turn(workers: Pools, tmp_path: Path, strategies: tuple[str, str]) -> None:
    """Interrupted after one step and after four: the second step has no turn of the generator, the fifth has one."""
    expected = reference(workers, build, "single", 5).losses
    found: list[float] = []
    for strategy, steps in zip((*strategies, strategies[0]), (1, 3, 1), strict=True):
        found += workers(Strategy.parse(strategy).workers, resumed, build, tmp_path, strategy, steps)[0]
    assert found == pytest.approx(expected, rel=DOUBLE_TOLERANCE)


def proved(strategy: str) -> Any:
    return prove_first_step(Program.build(build(), Strategy.parse(strategy)))


def broken_and_proved(strategy: str) -> Any:
    with second_not_averaged():
        return proved(strategy)


@pytest.mark.parametrize("strategy", ["dp=2", "dp=2,microbatches=2"])
def test_the_first_step_is_proved_turn_by_turn(workers: Pools, strategy: str) -> None:
    for found in workers(2, proved, strategy):
        assert (found.proved, found.turns, found.reason) == (True, 2, None)
        assert found.gradient_error < DOUBLE_TOLERANCE
        assert str(found).startswith("first step, each of its 2 turns from the same weights, equals one process")


def test_a_second_turn_that_is_wrong_is_not_proved(workers: Pools) -> None:
    with pytest.raises(NotProved, match="the gradient of generator"):
        workers(2, broken_and_proved, "dp=2")


class Failing:
    """Loss of the generator that is not finite in its second call."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return made(model, batch) * (float("nan") if self.broken else 1.0)


def broken_turn(policy: str) -> tuple[list[bool], str, bool]:
    """Which networks a step changes whose second turn is not finite, the error, and whether all counts as finite."""
    failing = Failing()
    turns = (TURNS[0], Turn(step=failing, parameters=("generator.*",)))
    program = Program.build(build(step=turns), Strategy.parse("dp=2"))
    Guard(program, policy, lambda _: None)
    first, second = shares_of(program, 2)
    program.step_share(first)
    before = {name: value.clone() for name, value in program.engine.module.state_dict().items()}
    failing.broken, error = True, ""
    try:
        program.step_share(second)
    except NotFinite as found:
        error = str(found)
    now = program.engine.module.state_dict()
    changed = [
        any(not torch.equal(now[name], value) for name, value in before.items() if name.startswith(network))
        for network in ("critic", "generator")
    ]
    return changed, error, program.is_finite()


def test_a_turn_that_is_not_finite_is_skipped_alone(workers: Pools) -> None:
    for changed, error, finite in workers(2, broken_turn, SKIP):
        assert (changed, error, finite) == ([True, False], "", True)


def test_a_step_that_ends_between_its_turns_is_no_state_to_save(workers: Pools) -> None:
    for changed, error, finite in workers(2, broken_turn, STOP):
        assert (changed, finite) == ([True, False], False)
        assert "the loss is nan" in error
        assert "the turns before this one were applied" in error


@pytest.mark.parametrize("strategy", ["fsdp=2", "tp=2", "pp=2", "dp=2,fsdp=2", "dp=2,recompute=full"])
def test_strategies_that_cannot_take_turns_are_refused(strategy: str) -> None:
    with pytest.raises(StrategyError, match=r"turns of a step train with dp alone.*: use dp="):
        Program.build(build(), Strategy.parse(strategy))


def one_adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.1)


def without_gradient(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model.generator(batch[0][:, 3:]).mean()
    return loss


def thawing(model: Any, batch: Any) -> Tensor:
    model.generator.requires_grad_(True)
    return made(model, batch)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": one_adam}, r"Adam, an optimizer of .* holds parameters of several turns \(critic.0.weight, gen"),
        ({"step": [TURNS[0]]}, "no turn of workload 'turns' trains generator.0.weight and 3 more"),
        (
            {"step": [*TURNS, Turn(step=made, parameters=("critic.0.*",))]},
            "turns 1 and 3 .* both train critic.0.weight",
        ),
        (
            {"step": [TURNS[1], Turn(step=judged, parameters=("critics.*",))]},
            "turn 2 of workload 'turns': 'critics.\\*' matches no trained parameter",
        ),
        ({"step": [Turn(step=without_gradient, parameters=("critic.*",)), TURNS[1]]}, r"\(turn 1\)' returns losses wi"),
        ({"step": [Turn(step=thawing, parameters=("critic.*",)), TURNS[1]]}, "requires_grad of parameter 'generator"),
    ],
)
def test_turns_that_cannot_be_meant_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        stepped(build(**changes), "single")


def test_groups_are_those_of_each_turn() -> None:
    """Options by name stay within a turn, even where two turns have equal ones."""
    given: list[Any] = []

    def optimizers(groups: Any) -> Any:
        given[:] = [
            ({key: value for key, value in group.items() if key != "params"}, len(group["params"])) for group in groups
        ]
        return [torch.optim.Adam(groups[:2], lr=0.1), torch.optim.Adam(groups[2:], lr=0.1)]

    rule = {"*.weight": {"weight_decay": 0.1}}
    stepped(build(optimizer=optimizers, groups=rule), "single")
    assert given == [({"weight_decay": 0.1}, 2), ({}, 2)] * 2


def test_half_precision_equals_one_process_up_to_rounding(workers: Pools) -> None:
    expected = train(workers, narrow, "single", 2)
    assert_equal(train(workers, narrow, "dp=2", 2), expected, 0.2)


def narrow() -> Workload:
    collate = lambda samples: [default_collate(samples)[0].float(), default_collate(samples)[1]]  # noqa: E731
    sgd = lambda groups: [torch.optim.SGD([group], lr=0.1) for group in groups]  # noqa: E731
    return build(model=GAN, precision="bf16", collate=collate, optimizer=sgd)
