"""Build a workload's optimizer over named parameters, and check that it holds exactly these.

An optimizer function sees all parameters of the model in the order of the model on every worker, whole: groups that
depend on a name, a place in the list or a shape are then the same under every strategy. What a worker does not update
is on the meta device while the optimizer is built, and taken out of it afterwards.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError, blamed
from shardwise.parallel.optim.groups import check_options, grouped
from shardwise.workload.turns import names_of_turns
from shardwise.workload.workload import Workload

MOST_NAMED = 3
"""Number of parameters that an error message names."""


class Several(torch.optim.Optimizer):
    """Several optimizers, each over its own parameters, as one that steps them in turn.

    Groups and state are those of its parts: a schedule or a checkpoint that changes one changes the other.

    Attributes:
        parts: the optimizers.
        stepped: those that `step` steps.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        self.stepped = self.parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Run a step of each part in `stepped`."""
        for part in self.stepped:
            part.step()


def as_one(made: Any) -> torch.optim.Optimizer:
    """Return what a workload's optimizer function made as one optimizer."""
    optimizer: torch.optim.Optimizer = Several(made) if isinstance(made, (list, tuple)) else made
    return optimizer


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that an optimizer consists of: itself, or the parts of several."""
    return optimizer.parts if isinstance(optimizer, Several) else (optimizer,)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the class name of an optimizer; of several `Muon with AdamW`."""
    return _joined(parts_of(optimizer))


def _joined(parts: Sequence[torch.optim.Optimizer]) -> str:
    return " with ".join(type(part).__name__ for part in parts)


def make_optimizer(workload: Workload, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the workload's optimizer over `parameters`, in their order.

    Raises:
        WorkloadError: the function fails or makes no optimizer; the optimizer does not hold exactly the parameters, or
            needs a closure.
    """
    given = grouped(workload, parameters)
    with blamed(f"the optimizer of workload {workload.name!r}"):
        made = workload.optimizer(given)
    parts = made if isinstance(made, (list, tuple)) else [made]
    names = {parameter: name for name, parameter in parameters.items()}
    for part in parts:
        _check_kind(workload, part)
    _check_held(workload, parts, names)
    _check_apart(workload, parts, names)
    for part in parts:
        check_options(workload, part, names)
    return as_one(made)


def _check_kind(workload: Workload, optimizer: Any) -> None:
    if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
        raise WorkloadError(
            f"optimizer of workload {workload.name!r} must make a torch optimizer or a list of them, not {optimizer!r}"
        )
    if required(type(optimizer).step):
        raise WorkloadError(
            f"{type(optimizer).__name__}, the optimizer of workload {workload.name!r}, needs a closure that computes "
            "the loss anew, several times in a step: use an optimizer whose step() needs nothing, such as AdamW"
        )


def required(method: Any) -> list[str]:
    """Return the names of the arguments that a method must be given, besides `self`."""
    try:
        arguments = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):  # a builtin without a signature
        return []
    return [each.name for each in arguments if each.default is each.empty and each.kind in _NEEDED]


_NEEDED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _check_held(workload: Workload, parts: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
    """Check that optimizers hold each given parameter once together, and no other. Raises WorkloadError."""
    held = [parameter for part in parts for group in part.param_groups for parameter in group["params"]]
    what = f"{_joined(parts)}, the optimizer of workload {workload.name!r},"
    others = [f"one of shape {tuple(parameter.shape)}" for parameter in held if parameter not in names]
    if others:
        raise WorkloadError(
            f"{what} holds parameters that are not the model's, {named(others)}: build it over the parameters that the "
            "function is given"
        )
    twice = [names[parameter] for parameter, count in Counter(held).items() if count > 1]
    if twice:
        raise WorkloadError(f"{what} would update {named(twice)} twice in a step: put each parameter in one group")
    missing = [name for parameter, name in names.items() if parameter not in set(held)]
    if missing:
        raise WorkloadError(
            f"{what} leaves out {named(missing)}, which would never be trained: return a list of optimizers, one of "
            "them for these, or set requires_grad=False on them in the model"
        )


def _check_apart(workload: Workload, parts: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
    """Check that each optimizer holds parameters of one turn alone. Raises WorkloadError."""
    turns = names_of_turns(workload.name, workload.turns, list(names.values()))
    for part in parts:
        held = {names[parameter] for group in part.param_groups for parameter in group["params"]}
        found = [next(name for name in turn if name in held) for turn in turns if held & set(turn)]
        if len(found) > 1:
            raise WorkloadError(
                f"{type(part).__name__}, an optimizer of workload {workload.name!r}, holds parameters of several turns "
                f"({named(found)}), and its steps would count for all: return a list of optimizers, one for each of "
                "the groups that the function is given"
            )


def parts_of_turns(
    optimizer: torch.optim.Optimizer, turns: Sequence[Collection[str]], names: Mapping[nn.Parameter, str]
) -> list[tuple[torch.optim.Optimizer, ...]]:
    """Return the parts of an optimizer that hold the parameters of each turn.

    Args:
        optimizer: what `make_optimizer` returned.
        turns: names of the parameters that each turn trains.
        names: names of the parameters that the optimizer holds.
    """
    held = [{names[p] for group in part.param_groups for p in group["params"]} for part in parts_of(optimizer)]
    return [
        tuple(part for part, own in zip(parts_of(optimizer), held, strict=True) if own & set(turn)) for turn in turns
    ]


def named(names: Sequence[str]) -> str:
    """Join the first names for a message, and count the rest."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def partly(
    workload: Workload, trained: Mapping[str, nn.Parameter], here: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the workload's optimizer over the parameters `here` alone, in the groups that it has over all.

    Args:
        workload: its function is called with as many parameters as the model has.
        trained: the model's parameters by name, whole, without values (on the meta device).
        here: those to update, or what stands for them: shapes may be of a part.

    Raises:
        WorkloadError: see `make_optimizer`.
    """
    like = make_optimizer(workload, trained)
    optimizer = make_optimizer(workload, {name: here.get(name, empty) for name, empty in trained.items()})
    names = {parameter: name for name, parameter in trained.items()}
    members = [[names[parameter] for parameter in group["params"]] for group in like.param_groups]
    if len(members) != len(optimizer.param_groups):  # the groups depend on shapes
        if isinstance(optimizer, Several):
            raise WorkloadError(
                f"the optimizers of workload {workload.name!r} have other groups over parts of parameters than over "
                "whole ones: make groups by name or by number of dimensions"
            )
        optimizer.param_groups[:] = [{} for _ in members]
    for group, given, found in zip(optimizer.param_groups, like.param_groups, members, strict=True):
        options = {key: copy.deepcopy(value) for key, value in given.items() if key != "params"}
        group.update(options)  # in place: parts of an optimizer may share its groups
        group["params"] = [here[name] for name in found if name in here]
    _forget(optimizer, set(trained.values()) - set(here.values()))
    return optimizer


def _forget(optimizer: torch.optim.Optimizer, parameters: Collection[Tensor]) -> None:
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
