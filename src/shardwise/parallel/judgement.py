"""Decide whether the update of a step is applied, once its loss and gradient are known.

The decision uses numbers that all workers have already summed. It needs no further message, and all workers decide
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple

import torch
from torch import Tensor, nn

from shardwise.parallel.engine import Engine
from shardwise.parallel.faults import Fault, parameter_fault, scale_fault
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.optim.clipping import local_tensors
from shardwise.parallel.state.gather import gather_json
from shardwise.workload.data import Share

Judge = Callable[[float, float, Callable[[], Fault | None]], bool]
"""Decision function: (global loss, squared global gradient norm, search) -> whether the step's update is applied.

Called on all workers with the same numbers. If it raises, the step counts as not taken. The search, which is
collective, runs the passes again and finds the first value that is not finite. It returns None if it finds none.
"""


def buffers_of(engine: Engine) -> list[Tensor]:
    """Return the buffers that are held here, which passes may change."""
    return [held.tensor.detach() for held in engine.held.values() if not isinstance(held.tensor, nn.Parameter)]


class Judgement:
    """Caller of a judge: asks it about each step, and undoes the effects of its passes if the update is not applied.

    With `alone`, it decides on what this worker gives to an update, whatever the others do. With `settle`, it decides
    on a step once passes of the next one are under way, which `settle` ends; what they did to buffers is undone too.
    """

    def __init__(
        self,
        engine: Engine,
        mesh: Mesh,
        judge: Judge,
        *,
        alone: bool = False,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self._world = None if alone else mesh.world
        self._engine, self._mesh, self._judge = engine, mesh, judge
        self._buffers = buffers_of(engine)
        self._values = [buffer.clone() for buffer in self._buffers]
        self._settle = settle
        self._next = self._values if settle is None else [buffer.clone() for buffer in self._buffers]
        self._random = self._state()

    def begin(self) -> None:
        """Save the state that the passes of the next step may change: buffers and torch's random state."""
        self._values, self._next = self._next, self._values
        _copy(self._next, self._buffers)
        self._random = self._state()

    def accepts(self, share: Share | None, scales: Sequence[Tensor], report: Tensor) -> bool:
        """Return whether the update of a step is applied.

        `report` holds its sums over all workers: loss, squared norm, ... Without a share nothing can be searched.
        """
        loss, square, *_ = report.tolist()
        accepted = False
        try:
            accepted = self._judge(loss, square, lambda: None if share is None else self._find_fault(share, scales))
        except BaseException:
            self._set(self._random)
            raise
        finally:
            if not accepted:
                if self._settle is not None:
                    self._settle()
                    _copy(self._next, self._values)
                _copy(self._buffers, self._values)
        return accepted

    def _find_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find the first value of all workers that is not finite.

        It checks in this order: weights of the batch, parameters, outputs of modules, gradients.
        """
        engine = self._engine
        if self._settle is not None:
            self._settle()
        found = scale_fault(scales) or self._first(parameter_fault(local_tensors(engine.parameters), self._mesh.rank))
        for search in (engine.find_fault, engine.find_gradient_fault):
            if found is None:
                with self._replayed():
                    found = self._first(search(share, scales))
        return found

    def _first(self, fault: Fault | None) -> Fault | None:
        """Return the first fault of all workers. Returns None if there is none. Collective."""
        if self._world is None:
            return fault
        everybody = gather_json(fault and astuple(fault), self._world, self._mesh.device)
        return min((Fault(*each) for each in everybody if each is not None), default=None)

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        """Run passes inside the block from the state in which the step began.

        The current state is restored afterwards.
        """
        buffers, random = [buffer.clone() for buffer in self._buffers], self._state()
        _copy(self._buffers, self._values)
        self._set(self._random)
        try:
            yield
        finally:
            _copy(self._buffers, buffers)
            self._set(random)

    def _state(self) -> tuple[Tensor, Tensor | None]:
        device = self._mesh.device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _set(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._mesh.device)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
