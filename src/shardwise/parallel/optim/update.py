"""Update of the parameters on this worker: its optimizer, and how what it computes reaches the workers that need it.

each element from itself      an optimizer over the local parts, whatever cut them
whole matrices                `whole_matrices`: each is updated by one of the workers that hold its parts
zero=1                        `zero1`: each parameter is updated by one of the replicas
ps                            `served`: each parameter is updated by one of the parameter servers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.engine import Engine
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.optim.changed_numbers import with_made
from shardwise.parallel.optim.eight_bit import EightBitStates, check_states
from shardwise.parallel.optim.making import Several, make_optimizer, partly, parts_of_turns
from shardwise.parallel.optim.nature import Nature, nature_of
from shardwise.parallel.optim.optimizer_state import SHARED, OptimizerState
from shardwise.parallel.optim.schedule import Schedule, load_schedule_state, note_step, schedule_state
from shardwise.parallel.optim.served import ServedParameters, check_served
from shardwise.parallel.optim.whole_matrices import WholeMatrices
from shardwise.parallel.optim.zero1 import OwnedParameters
from shardwise.parallel.state.dtensor_rows import is_split, local
from shardwise.parallel.state.gather import anywhere, gather_json
from shardwise.parallel.state.layout import Layout
from shardwise.strategy import Strategy
from shardwise.workload.turns import names_of_turns
from shardwise.workload.workload import Workload

OPTIMIZER = "optimizer"
"""Entry of a program's state that holds what of the optimizer's state is no tensor."""

_CUTTING = ("fsdp", "pp", "tp")
"""Axes that put the parameters on several workers."""


class ParameterUpdate:
    """Optimizer and schedule of a workload on this worker. Building one is collective.

    Attributes:
        nature: what the optimizer needs to see.
        optimizer: optimizer of the parameters that this worker updates, in the groups that it has over all.
        turns: names of the parameters that each turn of a step trains; all as one without turns.
        schedule: schedule of its learning rates.
        state: its state as named pieces.
        served: the parameter servers that update the parameters; None if workers do.

    Raises:
        WorkloadError: the optimizer or the schedule cannot train this model.
        StrategyError: the optimizer needs to see what the strategy puts on several workers.
    """

    def __init__(self, workload: Workload, strategy: Strategy, mesh: Mesh, engine: Engine) -> None:
        self._strategy, self._mesh, self._engine = strategy, mesh, engine
        alone = mesh.world is None  # then nothing depends on it
        self.nature = (
            Nature("", plain=True) if alone else settled_nature(workload, strategy, engine.trained, mesh.device)
        )
        self._dealt = self._deal()
        self.served = ServedParameters(workload, strategy, mesh, engine) if strategy.ps else None
        owned = self.served or self._dealt
        names = list(engine.parameters) if owned is None else owned.mine
        self._matrices = self._share_matrices(names)
        self._rows: list[tuple[nn.Parameter, nn.Parameter]] = []
        here = self._updated(names)
        self.optimizer = self._make(workload, here)
        if strategy.states:
            check_states(self.optimizer, workload.name)
        self._eight_bit = EightBitStates(self.optimizer) if strategy.states else None
        self.turns = names_of_turns(workload.name, workload.turns, list(engine.trained))
        if workload.turns:  # which train whole parameters alone
            held_by = {parameter: name for name, parameter in here.items()}
            self._parts = parts_of_turns(self.optimizer, self.turns, held_by)
        self.schedule = Schedule(workload, self.optimizer)
        if self.served is not None:  # servers take its steps
            note_step(self.optimizer)
        self._made = schedule_state(self.optimizer, self.schedule.scheduler)
        held = {
            name: replace(engine.held[name], layout=Layout.whole(here[name].shape))
            if self._is_matrix(name)
            else engine.held[name]
            for name in here
        }
        codec = None if self._eight_bit is None else self._eight_bit.codec
        self._here = here
        self.state = OptimizerState(self.optimizer, here, held, self._written(here), codec)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, one line each."""
        count = sum(map(self._needs_all, self._engine.parameters))
        if not count:
            return ()
        return (
            f"{self.nature.name} looks at whole parameters: {count} of {len(self._engine.trained)} lie on several "
            "workers and are gathered on one of them for each update, which the prediction does not count",
        )

    def step(self, turn: int = 0) -> None:
        """Update the parameters of a turn from their gradients. Collective."""
        if isinstance(self.optimizer, Several) and len(self.turns) > 1:
            self.optimizer.stepped = self._parts[turn]
        if self._matrices is not None:
            self._matrices.collect()
        for parameter, rows in self._rows:  # the first forward pass may have moved them
            rows.data = local(parameter)
            rows.grad = None if parameter.grad is None else local(parameter.grad)
        (self.optimizer if self._eight_bit is None else self._eight_bit).step()
        for _, rows in self._rows:
            rows.grad = None
        if self._matrices is not None:
            self._matrices.scatter()
        if self._dealt is not None:
            self._dealt.exchange()

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of groups and schedule of this worker alone, JSON-able."""
        return with_made(schedule_state(self.optimizer, self.schedule.scheduler), self._made)

    def load_numbers(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `numbers`. Raises CheckpointError."""
        load_schedule_state(self.optimizer, self.schedule.scheduler, saved, self._made)

    def counts(self) -> dict[str, Any]:
        """Return the numbers of groups and schedule, and the state that is no tensor, JSON-able. Collective."""
        self.mirror()
        return {**self.numbers(), **self._plain()}

    def load_counts(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `counts`, after the tensors of the state. Raises CheckpointError."""
        self.load_numbers(saved)
        note_step(self.optimizer)
        if isinstance(plain := saved.get(OPTIMIZER), Mapping):
            self.state.load_plain(plain)
        if self._eight_bit is not None:
            self._eight_bit.narrow()
        if self.served is not None:
            self.served.write(self.optimizer, self._here)

    def mirror(self) -> None:
        """Fetch the state of the optimizer, if it is on parameter servers. Collective."""
        if self.served is not None:
            self.served.mirror(self.optimizer, self._here)

    def _plain(self) -> dict[str, Any]:
        mine = self.state.plain() if self.nature.plain else {}
        parts = [mine]
        if self.nature.plain and self._mesh.world is not None:
            parts = gather_json(mine, self._mesh.world, self._mesh.device)
        found = {name: values for part in parts for name, values in part.items() if name != SHARED or part is parts[0]}
        return {OPTIMIZER: found} if found else {}

    def _is_cut(self, name: str) -> bool:
        held = self._engine.held[name]
        return held.sharded or is_split(held.tensor)

    def _needs_all(self, name: str) -> bool:
        return name in self.nature.whole and self._is_cut(name)

    def _is_matrix(self, name: str) -> bool:
        return self._matrices is not None and name in self._matrices.mine

    def _deal(self) -> OwnedParameters | None:
        """Assign each parameter to the replica that updates it.

        Returns None without zero=1 or with a single replica.
        """
        group = self._mesh.replica_group
        if self._strategy.zero != 1 or group is None:
            return None
        return OwnedParameters(self._engine.parameters, group)

    def _share_matrices(self, names: list[str]) -> WholeMatrices | None:
        """Deal out the parameters that lie on several workers and must be updated whole.

        Returns None if there are none.
        """
        group = self._mesh.parts_group() if self.nature.whole else None
        found = {name: self._engine.parameters[name] for name in names if self._needs_all(name)}
        if group is None or not found:
            return None
        return WholeMatrices(found, self._engine.held, group, self._mesh.device, self._mesh.allocating)

    def _updated(self, names: list[str]) -> dict[str, nn.Parameter]:
        """Return what the optimizer updates here, by name: plain rows in place of DTensors, and whole matrices.

        An optimizer over DTensors derives the placement of the result for every operation on every parameter, which
        takes longer than a small model's whole backward pass.
        """
        found: dict[str, nn.Parameter] = {}
        for name in names:
            parameter = self._engine.parameters[name]
            if self._needs_all(name):
                if self._is_matrix(name):
                    assert self._matrices is not None
                    found[name] = self._matrices.mine[name]
            elif is_split(parameter):
                found[name] = nn.Parameter(local(parameter))
                self._rows.append((parameter, found[name]))
            else:
                found[name] = parameter
        return found

    def _make(self, workload: Workload, here: Mapping[str, nn.Parameter]) -> Any:
        trained = self._engine.trained
        if all(name in here and here[name].shape == whole.shape for name, whole in trained.items()):
            return make_optimizer(workload, {name: here[name] for name in trained})
        return partly(workload, trained, here)

    def _written(self, here: Mapping[str, nn.Parameter]) -> set[str]:
        """Return the names of the parameters whose optimizer state this worker writes."""
        engine, group = self._engine, self._mesh.replica_group
        writes = {name: engine.held[name].writes for name in engine.parameters}
        if self._dealt is not None and writes:
            # only the replica that updates a parameter has its state, whichever replica writes the parameter itself
            assert group is not None
            writes = dict(zip(writes, anywhere(list(writes.values()), group, self._mesh.device), strict=True))
        matrices = set() if self._matrices is None else self._matrices.written
        return {name for name in here if writes[name] or name in matrices}


def settled_nature(
    workload: Workload, strategy: Strategy, trained: Mapping[str, nn.Parameter], device: torch.device
) -> Nature:
    """Return the nature of a workload's optimizer after a check that it can train under a strategy.

    Raises:
        WorkloadError, StrategyError: see `ParameterUpdate`.
    """
    try:
        nature = nature_of(workload, trained, device)
    except WorkloadError as error:
        if strategy.workers > strategy.dp or strategy.ps or error.__cause__ is None:
            raise
        return Nature("", plain=True)  # its function looks at the values of parameters, which are whole here
    check_nature(workload, strategy, nature)
    return nature


def check_nature(workload: Workload, strategy: Strategy, nature: Nature) -> None:
    """Check that an optimizer can do its work under a strategy, and that its state can be saved.

    Raises:
        StrategyError: it needs to see what lies on several workers.
        WorkloadError: its state cannot be saved, or it draws random numbers.
    """
    if strategy.ps:
        check_served(workload, strategy, together=nature.together)
    what = f"{nature.name}, the optimizer of workload {workload.name!r},"
    if nature.random and strategy.workers > 1:
        raise StrategyError(
            f"{what} draws random numbers, which differ from worker to worker: use one worker (single), or an "
            "optimizer without noise"
        )
    if nature.together and strategy.workers > strategy.dp:
        split = ",".join(f"{axis}={getattr(strategy, axis)}" for axis in _CUTTING if getattr(strategy, axis) > 1)
        raise StrategyError(
            f"{what} looks at all parameters to update each, and {split} puts them on several workers: use "
            f"dp={strategy.workers}"
        )
    if nature.unsaved and not nature.random:
        raise WorkloadError(
            f"{what} keeps what a checkpoint cannot hold: its state {nature.unsaved}; use tensors, numbers, strings, "
            "None, or lists, tuples and dicts of these"
        )
