"""Find out, by trying it on small tensors, what an optimizer must see to update a parameter.

    element     part of a parameter is updated as it would be within the whole: Adam, SGD, Lion
    matrix      the update of an element depends on others of its parameter: Muon, Adafactor, Shampoo, LAMB
    together    the update of a parameter depends on other parameters: Prodigy

An optimizer steps on copies of a few parameters: whole, cut into rows, cut into columns, and beside parameters with
other gradients. Whatever differs is needed. Its state is also saved, read back and stepped on with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from shardwise.errors import CheckpointError, WorkloadError
from shardwise.parallel.optim.making import make_optimizer, name_of, partly, parts_of
from shardwise.parallel.optim.optimizer_state import OptimizerState
from shardwise.parallel.optim.plain_state import Unsaved, tensors_in
from shardwise.parallel.optim.schedule import load_schedule_state, schedule_state
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.workload.workload import Workload

BY_ELEMENT = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)
"""Optimizers that are known to update each element from that element alone, and need not be tried."""

STEPS = 4
"""Number of steps of a trial: some optimizers only prepare in the first."""

SIDES, CUBE = (136, 132), (20, 12, 3, 3, 2)
"""Largest sizes of tried matrices, and of tensors of more dimensions. Some optimizers treat small sides otherwise."""

CLOSE = 1e-6
"""Largest relative difference of updates that counts as rounding."""


@dataclass(frozen=True, slots=True)
class Nature:
    """Needs of an optimizer: what it must see to update a parameter, and what of it must be saved.

    Attributes:
        name: class name of the optimizer.
        whole: names of the parameters that must be updated whole.
        together: whether the update of a parameter depends on other parameters.
        random: whether two equal trials differ, because the optimizer draws random numbers.
        plain: whether the state has values that are no tensors.
        unsaved: what of its state a checkpoint cannot hold; empty if there is nothing.
    """

    name: str
    whole: frozenset[str] = frozenset()
    together: bool = False
    random: bool = False
    plain: bool = False
    unsaved: str = ""


def nature_of(workload: Workload, trained: Mapping[str, nn.Parameter], device: torch.device) -> Nature:
    """Return the nature of a workload's optimizer.

    Args:
        workload: its optimizer is tried, on parameters of its own.
        trained: the model's parameters by name, whole, without values (on the meta device).
        device: device of the trials.

    Raises:
        WorkloadError: the optimizer cannot be built over the parameters, or cannot take a step.
    """
    with _disable_current_modes(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        reference = make_optimizer(workload, trained)
        if all(type(part) in BY_ELEMENT and not _hooked(part) for part in parts_of(reference)):
            return Nature(name_of(reference))
        return _Trials(workload, trained, reference, device).nature()


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


@dataclass
class _Trials:
    """Trials of a workload's optimizer on small copies of some of its parameters."""

    workload: Workload
    trained: Mapping[str, nn.Parameter]
    reference: torch.optim.Optimizer
    device: torch.device
    _draw: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._draw = torch.Generator().manual_seed(0)

    @cached_property
    def classes(self) -> dict[Any, list[str]]:
        """Return the names of the parameters that are treated alike: of one kind of group, and as many dimensions."""
        names = {parameter: name for name, parameter in self.trained.items()}
        owner = {id(g): n for n, part in enumerate(parts_of(self.reference)) for g in part.param_groups}
        found: dict[Any, list[str]] = {}
        for group in self.reference.param_groups:
            options = sorted((key, _flag(value)) for key, value in group.items() if key != "params")
            for parameter in group["params"]:
                found.setdefault((owner[id(group)], str(options), parameter.dim()), []).append(names[parameter])
        return found

    @cached_property
    def chosen(self) -> list[str]:
        """Return the parameters to try: the two largest of each class, which lie beside each other."""
        size = {name: parameter.numel() for name, parameter in self.trained.items()}
        return [name for names in self.classes.values() for name in sorted(names, key=lambda n: -size[n])[:2]]

    @cached_property
    def values(self) -> dict[str, Tensor]:
        return {name: self._random(self.trained[name].shape) for name in self.chosen}

    @cached_property
    def gradients(self) -> list[dict[str, Tensor]]:
        return [self._gradients() for _ in range(STEPS)]

    def _gradients(self) -> dict[str, Tensor]:
        return {name: self._random(self.trained[name].shape) for name in self.chosen}

    def _random(self, shape: Sequence[int]) -> Tensor:
        most = SIDES if len(shape) <= len(SIDES) else (*CUBE, *[1] * len(shape))
        small = [min(size, limit) for size, limit in zip(shape, most, strict=False)]
        return torch.randn(small, generator=self._draw, dtype=torch.float64).to(self.device)

    def nature(self) -> Nature:
        """Return what the trials show.

        Raises:
            WorkloadError: the optimizer cannot take a step.
        """
        try:
            optimizer, parameters = self._start()
            alone = self._go_on(optimizer, parameters, self.gradients)
        except Exception as error:
            if self._changes(self.gradients, taken=_sparse) is not None:  # sparse gradients are never cut
                return Nature(name_of(self.reference), plain=True)
            raise WorkloadError(
                f"{name_of(self.reference)}, the optimizer of workload {self.workload.name!r}, cannot take a step: "
                f"{type(error).__name__}: {error}"
            ) from None
        parts = [self._parts_differ(alone, rows), self._parts_differ(alone, columns)]
        shaped = self._shaped_otherwise(optimizer, parameters)
        needed = {name for name in self.chosen if any(name in differ for differ in parts) or name in shaped}
        whole = {name for names in self.classes.values() if needed & set(names) for name in names}
        plain, unsaved = self._saved(optimizer, parameters, alone)
        random = self._differ(alone, self.gradients, self.chosen)
        together = not random and any(self._follow(alone, number) for number in (0, 1))
        return Nature(name_of(optimizer), frozenset(whole), together, random, plain, unsaved)

    def _start(
        self, cut: Callable[[Tensor], Tensor] = torch.clone
    ) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
        parameters = {name: nn.Parameter(cut(value).clone()) for name, value in self.values.items()}
        return partly(self.workload, self.trained, parameters), parameters

    def _go_on(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        gradients: Sequence[Mapping[str, Tensor]],
        taken: Callable[[Tensor], Tensor] = torch.clone,
    ) -> dict[str, Tensor]:
        """Take steps with what `taken` makes of each gradient, and return what each parameter has changed by."""
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for each in gradients:
            for name, parameter in parameters.items():
                parameter.grad = taken(each[name]).clone()
            optimizer.step()
        return {name: parameter.detach() - before[name] for name, parameter in parameters.items()}

    def _changes(
        self,
        gradients: Sequence[Mapping[str, Tensor]],
        cut: Callable[[Tensor], Tensor] = torch.clone,
        taken: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor] | None:
        """Return what a new trial changes each parameter by. Returns None if the optimizer cannot step there."""
        try:
            return self._go_on(*self._start(cut), gradients, taken or cut)
        except Exception:  # it needs what the trial does not give it
            return None

    def _parts_differ(self, alone: Mapping[str, Tensor], cut: Callable[[Tensor], Tensor]) -> set[str]:
        found = self._changes(self.gradients, cut)
        if found is None:
            return set(self.chosen)
        return {name for name in self.chosen if not _alike(found[name], cut(alone[name]), alone[name])}

    def _shaped_otherwise(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Return the parameters with state of another shape: it belongs to the whole even if it is not used yet."""
        return {
            name
            for name, parameter in parameters.items()
            for _, tensor in tensors_in(optimizer.state.get(parameter, {}), name)
            if tensor.numel() > 1 and tensor.shape != parameter.shape
        }

    def _differ(
        self, alone: Mapping[str, Tensor], gradients: Sequence[Mapping[str, Tensor]], names: Sequence[str]
    ) -> bool:
        found = self._changes(gradients)
        return found is None or any(not _alike(found[name], alone[name], alone[name]) for name in names)

    def _follow(self, alone: Mapping[str, Tensor], number: int) -> bool:
        """Return whether every other parameter, from `number` on, changes otherwise if the rest has other gradients."""
        kept = self.chosen[number::2]
        others = [{**self._gradients(), **{name: each[name] for name in kept}} for each in self.gradients]
        return self._differ(alone, others, kept)

    def _saved(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], alone: Mapping[str, Tensor]
    ) -> tuple[bool, str]:
        """Return whether the state has values that are no tensors, and what of it cannot be saved."""
        try:
            plain = bool(_state(optimizer, parameters).plain())
            half, held = self._start()
            self._go_on(half, held, self.gradients[: STEPS // 2])
            resumed, again = self._start()
            self._resume(half, held, resumed, again)
        except (Unsaved, CheckpointError) as error:
            return True, str(error)
        self._go_on(resumed, again, self.gradients[STEPS // 2 :])
        changed = {name: again[name].detach() - value for name, value in self.values.items()}
        differ = [name for name in self.chosen if not _alike(changed[name], alone[name], alone[name])]
        return plain, "something that is neither in its state nor in its groups" if differ else ""

    def _resume(
        self,
        old: torch.optim.Optimizer,
        given: Mapping[str, nn.Parameter],
        new: torch.optim.Optimizer,
        taken: Mapping[str, nn.Parameter],
    ) -> None:
        """Bring an optimizer to the state of another as a checkpoint would."""
        source, target = _state(old, given), _state(new, taken)
        for piece in source.pieces():
            name, _, key = piece.name.removeprefix("optimizer/").rpartition("/")
            place = target.piece(name, key, piece.layout.shape, piece.local.dtype)
            assert place is not None
            place.local.copy_(piece.local)
        target.load_plain(json.loads(json.dumps(source.plain())))
        load_schedule_state(new, None, json.loads(json.dumps(schedule_state(old, None))))
        with torch.no_grad():
            for name, parameter in taken.items():
                parameter.copy_(given[name])


def rows(tensor: Tensor) -> Tensor:
    """Return the first half of a tensor along its first dimension; all of one without dimensions."""
    return tensor[: -(-len(tensor) // 2)] if tensor.dim() else tensor


def columns(tensor: Tensor) -> Tensor:
    """Return the first half of a tensor along its second dimension; all of one without it."""
    return tensor[:, : -(-tensor.shape[1] // 2)] if tensor.dim() > 1 else tensor


def _sparse(tensor: Tensor) -> Tensor:
    """Return a tensor as the gradient of an embedding: sparse in its first dimension."""
    return tensor.to_sparse(1) if tensor.dim() > 1 else tensor.to_sparse()


def _state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    held = {name: TensorPlacement(value, Layout.whole(value.shape), 1, True) for name, value in parameters.items()}
    return OptimizerState(optimizer, parameters, held, set(parameters))


def _flag(value: Any) -> Any:
    """Return what of an option may change the kind of an update: of a number, whether it is 0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return bool(value)
    return [_flag(entry) for entry in value] if isinstance(value, (list, tuple)) else repr(value)


def _alike(changed: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return bool((changed - expected).norm() <= CLOSE * scale.norm())
