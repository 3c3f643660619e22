"""Pipelines that do not wait for the end of a step equal a plain model whose updates use the gradient before."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models import WORKLOADS, adam, make, points
from pool import Pools
from torch import Tensor, nn

from shardwise.errors import NotFinite, StrategyError
from shardwise.parallel.check import check_strategy
from shardwise.parallel.pipeline.executor import PipelineExecutor
from shardwise.parallel.pipeline.weight_versions import WeightVersions
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.run.training.guard import Guard
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

STEPS, SEED = 6, 3
STRATEGIES = ("pp=2,microbatches=4", "pp=4", "pp=2,tp=2", "pp=2,recompute=full", "pp=4,recompute=1/2", "pp=2,compile=1")


def layers(norm: bool = False) -> nn.Sequential:
    found: list[nn.Module] = []
    for width in (6, 16, 16, 16):
        found += [nn.Linear(width, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh()]
    return nn.Sequential(*found, nn.Linear(16, 4))


def workload(norm: bool = False, **changes: Any) -> Workload:
    options: dict[str, Any] = {"optimizer": adam, "seed": SEED, "dataset": points(8 * STEPS), **changes}
    return make(partial(layers, norm), **options)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def clipped() -> Workload:
    return workload(clip_norm=0.1)


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def moved_average() -> Workload:
    return workload(schedule=halving, average=0.5)


def tail() -> Workload:
    """The last batch of an epoch has two samples, too few to go on from."""
    return workload(dataset=points(8 * (STEPS - 3) + 2))


def by_hand(made: Workload, steps: int = STEPS, *, delay: int = 1) -> dict[str, Any]:
    """Losses and weights after some steps of plain PyTorch whose updates use the gradient `delay` steps before."""
    torch.manual_seed(made.seed)
    model = made.model()
    optimizer = made.optimizer(list(model.parameters()))
    scheduler = None if made.schedule is None else made.schedule(optimizer)
    losses: list[float] = []
    waiting: list[list[Tensor | None]] = []
    loader, epoch = Program.build(made, Strategy()).loader(), 0
    while len(losses) < steps:
        for share in loader.shares(epoch):
            batch = share.microbatches[0].data
            optimizer.zero_grad()
            loss = made.loss(model(made.inputs(batch)), batch)
            loss.backward()
            losses.append(loss.item())
            waiting.append([p.grad for p in model.parameters()])
            if len(waiting) > delay:
                for parameter, gradient in zip(model.parameters(), waiting.pop(0), strict=True):
                    parameter.grad = gradient
                if made.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), made.clip_norm)
                optimizer.step()
            if scheduler is not None:
                scheduler.step()  # it moves in the first step too, which has no update
            if len(losses) == steps:
                break
        epoch += 1
    return {"losses": losses, "state": model.state_dict()}


def run(factory: Any, strategy: str, steps: int = STEPS, folder: Path | None = None) -> dict[str, Any]:
    """Losses as they are told, and the full weights, of some steps after those of the newest checkpoint, if any."""
    program = Program.build(factory(), Strategy.parse(f"{strategy},schedule=pipedream"))
    checkpoints = None if folder is None else Checkpoints(folder)
    path = None if checkpoints is None else checkpoints.latest()
    if checkpoints is not None and path is not None:
        checkpoints.load(program, path)
    assert prove_first_step(program).proved
    losses: list[float] = []
    last = program.steps + steps
    while program.steps < last:
        epoch, batch = divmod(program.steps, program.loader().batches or 1)
        for share in program.loader().shares(epoch, batch):
            losses.append(float(program.step_share(share)))
            if program.steps == last:
                break
    if checkpoints is not None:
        checkpoints.save(program, {"batch": program.steps})
        checkpoints.wait()
    notes = program.notes
    return {"losses": losses, "state": program.full_state_dict(), "notes": notes}


def assert_equal(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        told = partial("{}: {}".format, name)
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance / 100, msg=told)


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_updates_use_the_gradient_at_weights_one_step_old(workers: Pools, strategy: str, optimizer: Any) -> None:
    factory = partial(workload, optimizer=optimizer)
    found, expected = workers(Strategy.parse(strategy).workers, run, factory, strategy), by_hand(factory())
    assert_equal(found[0]["state"], expected["state"])
    for each in found:  # the loss of a step is told with the update that uses its gradient
        assert each["losses"] == pytest.approx([expected["losses"][0], *expected["losses"][:-1]], rel=1e-10)


@pytest.mark.parametrize("factory", [clipped, tail, partial(workload, schedule=halving)])
@pytest.mark.parametrize("strategy", ["pp=2", "pp=4,microbatches=4"])
def test_clipping_schedules_and_small_last_batches(workers: Pools, factory: Any, strategy: str) -> None:
    found, expected = workers(Strategy.parse(strategy).workers, run, factory, strategy), by_hand(factory())
    assert_equal(found[0]["state"], expected["state"])


def test_it_is_not_the_training_of_one_process(workers: Pools) -> None:
    with pytest.raises(AssertionError):
        assert_equal(workers(2, run, workload, "pp=2")[0]["state"], by_hand(workload(), delay=0)["state"], 1e-4)


@pytest.mark.parametrize("factory", [workload, partial(workload, norm=True), moved_average])
@pytest.mark.parametrize(("first", "second"), [("pp=2", "pp=2"), ("pp=4", "pp=2"), ("pp=2", "pp=2,tp=2")])
def test_resuming_equals_going_on(workers: Pools, tmp_path: Path, factory: Any, first: str, second: str) -> None:
    first, second = f"{first},microbatches=4", f"{second},microbatches=4"
    whole = workers(2, run, factory, "pp=2,microbatches=4", STEPS)[0]
    before = workers(Strategy.parse(first).workers, run, factory, first, 3, tmp_path)[0]
    after = workers(Strategy.parse(second).workers, run, factory, second, STEPS - 3, tmp_path)[0]
    assert_equal(after["state"], whole["state"])
    assert before["losses"] + after["losses"] == pytest.approx(whole["losses"], rel=1e-10)


def goes_on_synchronously(folder: Path) -> tuple[str, ...]:
    program, checkpoints = Program.build(workload(), Strategy.parse("pp=2")), Checkpoints(folder)
    path = checkpoints.latest()
    assert path is not None
    checkpoints.load(program, path)
    return program.notes


def test_another_schedule_tells_that_it_drops_the_last_gradient(workers: Pools, tmp_path: Path) -> None:
    workers(2, run, workload, "pp=2", 2, tmp_path)
    assert any("no update has used" in note for note in workers(2, goes_on_synchronously, tmp_path)[0])


def overlapping(strategy: str) -> list[int]:
    """Numbers of microbatches whose backward pass is to come after each step."""
    program = Program.build(workload(), Strategy.parse(f"{strategy},schedule=pipedream"))
    pipeline: Any = program.engine
    found = []
    for share in program.loader().shares(0):
        program.step_share(share)
        found.append(len(pipeline._pipeline._inflight))
    program.meet()
    assert not pipeline._pipeline._inflight
    return found


def test_a_step_begins_before_the_one_before_it_has_ended(workers: Pools) -> None:
    assert workers(4, overlapping, "pp=4") == [[3] * STEPS, [2] * STEPS, [1] * STEPS, [0] * STEPS]


# ---- broken on purpose ----------------------------------------------------------------------------------------------


def newest_alone() -> Any:
    """Weights are not kept: an update changes those that backward passes to come have been computed with."""
    use = WeightVersions.use

    def newest(self: Any, version: int | None) -> None:
        use(self, None if version is None else self.newest)

    return mock.patch.object(WeightVersions, "use", newest)


def last_gradient_of_a_step_lost() -> Any:
    backward = PipelineExecutor._backward

    def lossy(self: Any, work: Any, action: Any) -> None:
        backward(self, work, action)
        if action.microbatch == 0:
            for module in self.stages.values():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)

    return mock.patch.object(PipelineExecutor, "_backward", lossy)


def broken(breaking: Any, strategy: str) -> Any:
    with breaking(), mock.patch("test_delayed_updates.prove_first_step", mock.Mock()):
        return run(workload, strategy)


@pytest.mark.parametrize(
    ("breaking", "strategy"), [(newest_alone, "pp=2,recompute=full"), (last_gradient_of_a_step_lost, "pp=2")]
)
def test_comparison_notices_what_is_broken(workers: Pools, breaking: Any, strategy: str) -> None:
    found = workers(2, broken, breaking, strategy)[0]
    with pytest.raises(AssertionError):
        assert_equal(found["state"], by_hand(workload())["state"], 1e-6)


# ---- what it cannot train -------------------------------------------------------------------------------------------


def refused(name: str) -> str:
    try:
        Program.build(WORKLOADS[name](), Strategy.parse("pp=2,schedule=pipedream"))
    except StrategyError as error:
        return str(error)
    return ""


def test_parameters_of_several_stages_are_refused(workers: Pools) -> None:
    strategy = Strategy.parse("pp=2,schedule=pipedream")
    check_strategy(WORKLOADS["separate"](), strategy)
    with pytest.raises(StrategyError, match="is used in several stages"):
        check_strategy(WORKLOADS["tied"](), strategy)  # before any worker starts
    for each in workers(2, refused, "tied"):
        assert "is used in several stages" in each


class Poisoned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().sum() < 1e6)  # inf where a sample is huge


def poisoned() -> Workload:
    data = points(8 * STEPS)
    data.tensors[0][17] = 1e9
    return make(lambda: nn.Sequential(Poisoned(), *layers(norm=True)), data, optimizer=adam, seed=SEED)


def held(strategy: str) -> tuple[dict[str, int], int]:
    """Return the bytes that a program holds after some steps, and those of its trained parameters."""
    made = workload()
    program = Program.build(made, Strategy.parse(strategy))
    for share in program.loader().shares(0):
        program.step_share(share)
    return program.held_bytes(), sum(each.numel() * each.element_size() for each in program.engine.parameters.values())


def test_two_versions_of_weights_and_gradients_are_held(workers: Pools) -> None:
    for found, trained in workers(2, held, "pp=2,microbatches=4,schedule=pipedream"):
        assert found["parameters"] == 2 * trained
        assert found["gradients"] == 2 * trained
    for found, trained in workers(2, held, "pp=2,microbatches=4"):
        assert found["parameters"] == found["gradients"] == trained


def stopped(strategy: str, policy: str) -> tuple[str, int]:
    program = Program.build(poisoned(), Strategy.parse(f"{strategy},schedule=pipedream"))
    Guard(program, policy, print)
    try:
        for share in program.loader().shares(0):
            program.step_share(share)
    except NotFinite as error:
        return str(error), program.steps
    state = program.full_state_dict()
    assert state is None or all(bool(tensor.isfinite().all()) for tensor in state.values())
    return "", program.steps


def test_a_step_that_is_not_finite_is_named_when_its_update_is_due(workers: Pools) -> None:
    (told, steps), _ = workers(2, stopped, "pp=2", "stop")
    assert told.startswith(f"step {steps}: ")
    assert "the first that is not finite is module '0'" in told
    assert "nothing of this step was applied" in told


def test_a_step_that_is_skipped_leaves_weights_and_buffers_finite(workers: Pools) -> None:
    assert [told for told, _ in workers(2, stopped, "pp=2", "skip")] == ["", ""]
