"""Turns of a training step: alternating updates, as those of a generator and its critic.

It says nothing about parallelism. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from shardwise.errors import WorkloadError, nearest

NOT_PREDICTED = "predictions of a step in turns are not made"
"""Reason why a workload with turns has no prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Turn of a training step, which trains some of the parameters; the others are constants in it.

    Attributes:
        step: maps (model, batch) to losses, as `Workload.step` does.
        parameters: patterns (`critic.*`) of the names of the parameters that the turn trains.
        every: number of training steps of which the turn is taken in the first only; 1: in each.
    """

    step: Callable[[Any, Any], Any]
    parameters: Sequence[str]
    every: int = 1

    def __post_init__(self) -> None:
        if not callable(self.step):
            raise WorkloadError(f"step of a turn must be a function, not {self.step!r}")
        if not _are_patterns(self.parameters):
            raise WorkloadError(
                f"parameters of a turn must be a tuple of patterns such as ('critic.*',), not {self.parameters!r}"
            )
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise WorkloadError(f"every={self.every!r} of a turn: must be a whole number of training steps, 1 or more")

    def is_due(self, steps: int) -> bool:
        """Return whether the turn is taken in the training step that follows `steps` others."""
        return steps % self.every == 0


def _are_patterns(parameters: Any) -> bool:
    listed = isinstance(parameters, Sequence) and not isinstance(parameters, str)
    return listed and len(parameters) > 0 and all(isinstance(pattern, str) for pattern in parameters)


def checked_turns(name: str, turns: Sequence[Any]) -> None:
    """Check the turns of workload `name`. Raises WorkloadError."""
    if not turns:
        raise WorkloadError(f"step of workload {name!r} is empty: give a function, or one Turn or more")
    for turn in turns:
        if not isinstance(turn, Turn):
            raise WorkloadError(f"step of workload {name!r} must be a function or a list of turns, and has {turn!r}")
        parameters = getattr(turn.step, "parameters", None)
        if callable(parameters) and next(iter(parameters()), None) is not None:
            raise WorkloadError(
                f"step of a turn of workload {name!r} has parameters of its own: make them parts of the model"
            )
    if all(turn.every > 1 for turn in turns):
        raise WorkloadError(
            f"no turn of workload {name!r} is taken in each step, so that some would train nothing: give one every=1"
        )


def names_of_turns(name: str, turns: Sequence[Turn], trained: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the parameters that each turn trains; all as one if there are no turns.

    Args:
        name: name of the workload.
        turns: its turns.
        trained: names of the trained parameters, in the order of the model.

    Raises:
        WorkloadError: a pattern matches nothing, or a parameter is in two turns or in none.
    """
    if not turns:
        return (tuple(trained),)
    owner: dict[str, int] = {}
    for number, turn in enumerate(turns):
        for pattern in turn.parameters:
            matching = [each for each in trained if fnmatchcase(each, pattern)]
            if not matching:
                raise WorkloadError(
                    f"turn {number + 1} of workload {name!r}: {pattern!r} matches no trained parameter"
                    f"{nearest(pattern, trained)}"
                )
            _own(name, owner, matching, number)
    missing = [each for each in trained if each not in owner]
    if missing:
        raise WorkloadError(
            f"no turn of workload {name!r} trains {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: put it into the parameters of a turn, or set "
            "requires_grad=False on it in the model"
        )
    return tuple(tuple(each for each in trained if owner[each] == number) for number in range(len(turns)))


def _own(name: str, owner: dict[str, int], matching: Sequence[str], number: int) -> None:
    for each in matching:
        before = owner.setdefault(each, number)
        if before != number:
            raise WorkloadError(
                f"turns {before + 1} and {number + 1} of workload {name!r} both train {each}: a parameter can be in "
                "one turn only"
            )


def losses_of_turns(name: str, taken: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the losses of the turns of a step, by name; the single loss of a turn becomes `turn 1`, `turn 2`.

    Args:
        name: name of the workload.
        taken: number of each turn that was taken, from 0 -> its losses by name.

    Raises:
        WorkloadError: two turns have a loss of one name.
    """
    found: dict[str, Any] = {}
    for number, losses in taken.items():
        for key, loss in losses.items():
            own = f"turn {number + 1}" if [*losses] == ["loss"] else key
            if own in found:
                raise WorkloadError(f"two turns of workload {name!r} have a loss {own!r}: give each loss its own name")
            found[own] = loss
    return found
