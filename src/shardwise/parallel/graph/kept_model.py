"""The plain model behind a graph, kept without its weights: what it holds in Python goes on to count.

A schedule or a callback may change it between two steps (a dropout rate, a gate, a number that the loss reads). The
engine then traces the step again. Modules that run as they are count in it, too, whichever shape of batch they see.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.parallel.state.build_model import frozen_later, plain_model
from shardwise.workload.trace.evolving import functions_of
from shardwise.workload.trace.graph import StepGraph
from shardwise.workload.trace.opaque import rehomed
from shardwise.workload.trace.python_state import PLAIN, PythonState
from shardwise.workload.workload import Workload


class KeptModel:
    """Module that was traced, without the values of its parameters.

    Args:
        workload: the workload that built it.
        module: the module; its parameters are replaced by ones on the meta device.
        opaque: names of its modules that run as they are.

    Attributes:
        module: the module, with parameters on the meta device.
    """

    def __init__(self, workload: Workload, module: nn.Module, opaque: Iterable[str]) -> None:
        self._workload, self.module = workload, module
        self._flags = [(name, weakref.ref(p), p.requires_grad) for name, p in module.named_parameters()]
        _forget_parameters(module)
        self._flags += [(name, weakref.ref(p), p.requires_grad) for name, p in module.named_parameters()]
        self._opaque = dict.fromkeys(opaque)
        self._state = self._now()

    def adopt(self, step: StepGraph) -> StepGraph:
        """Return the graph with its opaque calls made on the modules of this model."""
        modules = dict(self.module.named_modules())
        mine = {c.path: modules[c.path] for c in step.opaque if type(modules.get(c.path)) is type(c.module)}
        self._opaque.update(dict.fromkeys(mine))
        self._state = self._now()
        return replace(step, opaque=rehomed(step.graph, mine))

    def changed(self) -> bool:
        """Return whether a value in Python that the graph depends on has changed since the last call.

        Raises:
            WorkloadError: a parameter has been frozen or unfrozen.
        """
        for name, reference, trained in self._flags:
            parameter = reference()
            if parameter is not None and parameter.requires_grad != trained:
                raise WorkloadError(frozen_later(name))
        if not self._state.moved():
            return False
        self._state = self._now()
        return True

    def built(self) -> nn.Module:
        """Build the model again, with values and in the state of this one. The random state is as before."""
        workload = self._workload
        functions: list[Callable[..., Any]] = [*functions_of(workload), workload.model, workload.optimizer]
        functions += [workload.schedule] if workload.schedule is not None else []
        state = PythonState(nn.Module(), functions)
        with torch.random.fork_rng():
            model = plain_model(workload)
        state.restore()  # a factory may note what it has built last
        for name, module in model.named_modules():
            _copy_plain(self.module.get_submodule(name), module)
        return model

    def _now(self) -> PythonState:
        return PythonState(self.module, functions_of(self._workload), without=self._opaque)


def _forget_parameters(module: nn.Module) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for each in module.modules():
        for key, parameter in each._parameters.items():
            if parameter is not None:
                empty = made.get(parameter)
                if empty is None:
                    empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                made[parameter] = each._parameters[key] = empty


def _copy_plain(source: Any, target: Any, depth: int = 0) -> None:
    """Copy numbers, strings and containers of such from one object to another of the same kind."""
    for key, value in vars(source).items():
        if isinstance(value, PLAIN) or (isinstance(value, (list, tuple, dict, set)) and _plain(value)):
            vars(target)[key] = copy(value)
        elif depth < 3 and hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (Tensor, type)):
            other = vars(target).get(key)
            if type(other) is type(value):
                _copy_plain(value, other, depth + 1)


def _plain(values: Iterable[Any]) -> bool:
    items = (*values.keys(), *values.values()) if isinstance(values, dict) else tuple(values)
    return all(
        isinstance(item, PLAIN) or (isinstance(item, (list, tuple, dict, set)) and _plain(item)) for item in items
    )
