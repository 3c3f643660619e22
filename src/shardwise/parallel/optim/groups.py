"""Parameter groups by name: the options that a workload gives to each parameter, see `Workload.groups`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from shardwise.errors import WorkloadError, nearest
from shardwise.workload.turns import names_of_turns
from shardwise.workload.workload import Workload


def grouped(workload: Workload, parameters: Mapping[str, nn.Parameter]) -> list[Any]:
    """Return what the workload's optimizer is built over: the parameters, or groups of those with equal options.

    With turns there are groups of each turn, one after the other.

    Raises:
        WorkloadError: `groups` gives no options, or a pattern of it matches no parameter or the same as another one.
    """
    if workload.groups is None and not workload.turns:
        return list(parameters.values())
    options = {name: {} for name in parameters} if workload.groups is None else _options(workload, parameters)
    turns = names_of_turns(workload.name, workload.turns, list(parameters))
    return [group for names in turns for group in _of_equal_options(parameters, {n: options[n] for n in names})]


def _of_equal_options(
    parameters: Mapping[str, nn.Parameter], given: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for name, options in given.items():
        group = next((each for each in groups if _without_parameters(each) == options), None)
        if group is None:
            groups.append(group := {"params": [], **options})
        group["params"].append(parameters[name])
    return groups


def check_options(workload: Workload, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Check that the optimizer knows the options that `groups` gives. Raises WorkloadError for what looks like a typo.

    An optimizer may take options that have no default, so only a name that is close to a known one is refused.
    """
    known = getattr(optimizer, "defaults", {})
    for group in optimizer.param_groups if workload.groups is not None else ():
        given = _options(workload, {names[parameter]: parameter for parameter in group["params"]}, partly=True)
        for name, option in ((name, option) for name, options in given.items() for option in options):
            if option not in known and (guess := nearest(option, known)):
                kind = type(optimizer).__name__
                raise WorkloadError(
                    f"groups of workload {workload.name!r} give {name} {option!r}, not of {kind}{guess}"
                )


def _options(
    workload: Workload, parameters: Mapping[str, nn.Parameter], *, partly: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the options of each parameter by its name. `partly`: some parameters of the model may be left out."""
    rule = workload.groups
    if isinstance(rule, Mapping):
        return _by_pattern(workload, rule, list(parameters), partly=partly)
    assert rule is not None
    found = {}
    for name, parameter in parameters.items():
        options = rule(name, parameter)
        if not isinstance(options, Mapping) or "params" in options:
            raise WorkloadError(
                f"groups of workload {workload.name!r} gives {options!r} for {name}: must be a dict of options, such "
                "as {'weight_decay': 0.0}, or {} for none"
            )
        found[name] = dict(options)
    return found


def _by_pattern(
    workload: Workload, rules: Mapping[str, Mapping[str, Any]], names: Sequence[str], *, partly: bool
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    by: dict[str, str] = {}
    for pattern, options in rules.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching and not partly:
            raise WorkloadError(
                f"groups of workload {workload.name!r}: {pattern!r} matches no trained parameter"
                f"{nearest(pattern, names)}"
            )
        for name in matching:
            if name in by:
                raise WorkloadError(
                    f"groups of workload {workload.name!r}: {name} matches both {by[name]!r} and {pattern!r}; a "
                    "parameter can be in one group only"
                )
            by[name], found[name] = pattern, dict(options)
    return {name: found.get(name, {}) for name in names}


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
