"""Optimizers of Keras as torch optimizers: the same formulas, which differ from torch's in their details.

    Adam, AdamW   epsilon (1e-7) is added before the bias is corrected; the weight decay of AdamW is 0.004
    SGD           the momentum contains the learning rate
    RMSprop       epsilon is added under the root
    Adagrad       the accumulator starts at 0.1, epsilon is added under the root

Source: keras/src/optimizers of Keras 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError

Rule = Callable[["dict[str, Any]", Tensor, Tensor, "dict[str, Any]"], None]
"""Update of a parameter in place: (state, parameter, gradient, options of its group)."""


class KerasOptimizer(torch.optim.Optimizer):
    """Torch optimizer with the update rule of one of Keras.

    Options of a group are those of Keras by their names, `lr` for the learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rule: Rule, options: dict[str, Any]) -> None:
        self._rule = rule
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient: decay them first, then apply the rule."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["weight_decay"]:
                    parameter.mul_(1 - group["weight_decay"] * group["lr"])
                gradient, value = parameter.grad, group["clipvalue"]
                self._rule(
                    self.state[parameter], parameter, gradient.clamp(-value, value) if value else gradient, group
                )
        return loss


def _sgd(state: dict[str, Any], parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    lr, momentum = group["lr"], group["momentum"]
    if not momentum:
        parameter.sub_(gradient * lr)
        return
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(parameter)
    moved = state["momentum"].mul_(momentum).sub_(gradient * lr)
    parameter.add_(moved * momentum - gradient * lr if group["nesterov"] else moved)


def _adam(state: dict[str, Any], parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    first, second = group["beta_1"], group["beta_2"]
    if not state:
        state["step"] = torch.zeros(())
        state["momentum"], state["velocity"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if group["amsgrad"]:
            state["largest"] = torch.zeros_like(parameter)
    state["step"] += 1
    steps = float(state["step"])
    rate = group["lr"] * math.sqrt(1 - second**steps) / (1 - first**steps)
    momentum = state["momentum"].add_((gradient - state["momentum"]) * (1 - first))
    velocity = state["velocity"].add_((gradient.square() - state["velocity"]) * (1 - second))
    if group["amsgrad"]:
        velocity = torch.maximum(state["largest"], velocity, out=state["largest"])
    parameter.sub_(momentum * rate / (velocity.sqrt() + group["epsilon"]))


def _rmsprop(state: dict[str, Any], parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    rho = group["rho"]
    if not state:
        state["velocity"] = torch.zeros_like(parameter)
        if group["centered"]:
            state["mean"] = torch.zeros_like(parameter)
        if group["momentum"]:
            state["momentum"] = torch.zeros_like(parameter)
    denominator = state["velocity"].mul_(rho).add_(gradient.square() * (1 - rho)) + group["epsilon"]
    if group["centered"]:
        denominator = denominator - state["mean"].mul_(rho).add_(gradient * (1 - rho)).square()
    change = gradient * group["lr"] * denominator.rsqrt()
    if group["momentum"]:
        change = state["momentum"].mul_(group["momentum"]).add_(change)
    parameter.sub_(change)


def _adagrad(state: dict[str, Any], parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    if not state:
        state["accumulator"] = torch.full_like(parameter, group["initial_accumulator_value"])
    accumulator = state["accumulator"].add_(gradient.square())
    parameter.sub_(gradient * group["lr"] / (accumulator + group["epsilon"]).sqrt())


RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "SGD": (_sgd, ("momentum", "nesterov")),
    "Adam": (_adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    "AdamW": (_adam, ("beta_1", "beta_2", "epsilon", "amsgrad")),
    "RMSprop": (_rmsprop, ("rho", "momentum", "epsilon", "centered")),
    "Adagrad": (_adagrad, ("initial_accumulator_value", "epsilon")),
}
"""Class in Keras -> its rule and the names of its options."""

_UNKNOWN = {
    "use_ema": "use the workload's average",
    "gradient_accumulation_steps": "use microbatches of the strategy",
    "loss_scale_factor": "leave it out, the workload's precision needs none",
    "clipnorm": "use global_clipnorm, which all strategies share",
}
"""Option of every optimizer that is not taken over -> the remedy."""


def translated(optimizer: Any) -> Callable[[Iterable[nn.Parameter]], KerasOptimizer]:
    """Return a function of parameters that makes the torch form of a Keras optimizer.

    Raises:
        WorkloadError: the class or an option of it is not known here.
    """
    name = type(optimizer).__name__
    if name not in RULES:
        raise WorkloadError(
            f"the optimizer {name} of Keras is not known: known are {', '.join(RULES)}; give a torch optimizer, as in "
            "workload(..., optimizer=lambda parameters: torch.optim.NAdam(parameters))"
        )
    for option, remedy in _UNKNOWN.items():
        if getattr(optimizer, option, None):
            raise WorkloadError(f"the optimizer's {option}={getattr(optimizer, option)} is not taken over: {remedy}")
    rule, names = RULES[name]
    options = {option: getattr(optimizer, option) for option in names}
    scheduled = schedule_of(optimizer) is not None
    options["lr"] = 1.0 if scheduled else float(optimizer.learning_rate)  # a schedule is its own factor
    options["weight_decay"] = float(optimizer.weight_decay or 0.0)
    options["clipvalue"] = float(optimizer.clipvalue or 0.0)
    return lambda parameters: KerasOptimizer(parameters, rule, options)


def schedule_of(optimizer: Any) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None:
    """Return the scheduler of an optimizer whose learning rate is a schedule of Keras. Returns None without one."""
    import keras

    rate = optimizer._learning_rate
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return None
    return lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: float(rate(step)))
