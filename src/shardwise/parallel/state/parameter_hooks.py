"""Hooks on the gradients of parameters, applied to whole gradients once these are complete.

In one process a hook sees the gradient of the whole batch. So the hooks are taken off the parameters when the model is
built, and called after the gradients of all microbatches and replicas are summed. A gradient of which workers hold
parts is put together first, and each worker keeps its own part of what the hook gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import StrategyError
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.gather import anywhere
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.workload.trace.python_state import captured

Hook = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Hooked:
    """Hooks of one parameter.

    Attributes:
        shape: shape of the whole parameter.
        dtype: its dtype.
        gradient: functions of its gradient, which return another or None (`Tensor.register_hook`), by their handles.
        after: functions of the parameter with its gradient (`register_post_accumulate_grad_hook`), by their handles.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: Mapping[int, Hook]
    after: Mapping[int, Hook]


def take_hooks(model: nn.Module) -> dict[str, Hooked]:
    """Take the hooks off the parameters of a model, and return those of trained ones by name.

    A handle still removes its hook: it is called only while what was put in its place is there.
    """
    found = {}
    for name, parameter in model.named_parameters():
        gradient, after = (_taken(parameter, key) for key in ("_backward_hooks", "_post_accumulate_grad_hooks"))
        if parameter.requires_grad and (gradient or after):
            found[name] = Hooked(tuple(parameter.shape), parameter.dtype, gradient, after)
    return found


def _taken(parameter: nn.Parameter, kind: str) -> Mapping[int, Hook]:
    placed: dict[int, Any] | None = getattr(parameter, kind)
    if not placed:
        return {}
    taken = _Taken(placed)
    for number in placed:
        placed[number] = _nothing
    return taken


def _nothing(_: Any) -> None:
    """Stand for a hook that has been taken off its parameter."""


class _Taken(dict[int, Hook]):
    """Hooks taken from `placed`; those removed from there by their handles are left out."""

    def __init__(self, placed: dict[int, Hook]) -> None:
        super().__init__(placed)
        self._placed = placed

    def values(self) -> Any:
        """Return the hooks that have not been removed."""
        return [hook for number, hook in self.items() if number in self._placed]


def check_hooks(hooks: Mapping[str, Hooked], *, replaced: bool, served: bool = False) -> None:
    """Check that hooks on the gradients of parameters can be called under a strategy.

    Args:
        hooks: hooks by the name of their parameter.
        replaced: whether the strategy puts others in place of the parameters.
        served: whether parameter servers add up the gradients, which workers then do not see.

    Raises:
        StrategyError: a hook reads parameters themselves that are replaced, or there is one and servers add up.
    """
    if served and hooks:
        raise StrategyError(
            f"parameter {next(iter(hooks))!r} has a hook on its gradient, which parameter servers add up: use dp "
            "without ps, or leave the hook out"
        )
    if not replaced:
        return
    for name, hooked in hooks.items():
        for hook in (*hooked.gradient.values(), *hooked.after.values()):
            held = next((each for each in captured(hook) if _holds_parameters(each)), None)
            if held is not None:
                raise StrategyError(
                    f"a hook on parameter {name!r} uses {type(held).__name__}, which holds parameters of the model: "
                    "fsdp, tp and pp put others in their place; use dp, or a hook that uses its argument only"
                )


def _holds_parameters(value: Any) -> bool:
    if isinstance(value, (nn.Parameter, nn.Module, torch.optim.Optimizer)):
        return True
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    return isinstance(value, (list, tuple, set)) and any(_holds_parameters(each) for each in value)


class ParameterHooks:
    """Caller of the hooks of a model's parameters. Building and calling it is collective over all workers.

    Args:
        hooks: hooks by parameter, equal on all workers.
        held: placement of the parameters held here.
        mesh: position of this worker.
    """

    def __init__(self, hooks: Mapping[str, Hooked], held: Mapping[str, TensorPlacement], mesh: Mesh) -> None:
        self._hooks, self._held, self._mesh = hooks, held, mesh
        cut = [name in held and held[name].layout != Layout.whole(hooked.shape) for name, hooked in hooks.items()]
        if hooks and mesh.world is not None:
            cut = anywhere(cut, mesh.world, mesh.device)
        self._cut = dict(zip(hooks, cut, strict=True))

    @torch.no_grad()
    def apply(self, names: Collection[str]) -> None:
        """Call the hooks on the complete gradients of the parameters `names`, in the order in which autograd does."""
        for name, hooked in self._hooks.items():
            if name not in names:
                continue
            held = self._held.get(name)
            if self._cut[name]:
                self._apply_to_parts(hooked, held)
            elif held is not None and held.tensor.grad is not None:
                _call(hooked, held.tensor)

    def _apply_to_parts(self, hooked: Hooked, held: TensorPlacement | None) -> None:
        gradient = None if held is None or held.tensor.grad is None else local(held.tensor.grad)
        whole = self._whole(hooked, held, gradient)
        value = self._whole(hooked, held, None if held is None else local(held.tensor)) if hooked.after else whole
        if held is None or gradient is None:
            return
        parameter = nn.Parameter(value.clone())
        parameter.grad = whole
        _call(hooked, parameter)
        if hooked.after:
            local(held.tensor).copy_(held.layout.cut(parameter.detach()))
        if parameter.grad is None:
            held.tensor.grad = None
        else:
            gradient.copy_(held.layout.cut(parameter.grad))

    def _whole(self, hooked: Hooked, held: TensorPlacement | None, part: Tensor | None) -> Tensor:
        """Return a tensor of which every worker may hold a part. Collective over all workers."""
        full = torch.zeros(hooked.shape, dtype=hooked.dtype, device=self._mesh.device)
        if held is not None and part is not None and held.writes:
            held.layout.paste(part.to(full.device), full)
        dist.all_reduce(full, group=self._mesh.world)
        return full


def _call(hooked: Hooked, parameter: Any) -> None:
    for hook in hooked.gradient.values():
        result = hook(parameter.grad)
        if result is not None and result is not parameter.grad:
            parameter.grad.copy_(result)
    for hook in hooked.after.values():
        hook(parameter)
