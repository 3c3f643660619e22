"""Parameters of one server and the rule by which contributions of workers become updates: no sockets, no threads.

All that changes it is an event, a frame. Equal events in an equal order give equal bits, so a server that died is its
log, replayed.

    together    the update of a step is the mean of one contribution of each member; they also decide together whether
                it is applied, and by which factor it is clipped (staleness 0, and every proof)
    apart       an update is the mean of the next contributions, as many as there are members, whoever sends them
                (staleness above 0): as many updates as steps, each of as many samples as a global batch

A worker's clock is the number of contributions that it has given. Before its step c a worker waits until every
member's clock is c - S or more (Ho et al. 2013). All contributions of such clocks are in updates but those of the
last, unfinished one, so it computes with the parameters of at least c - S updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.parallel.optim.after_step import changed
from shardwise.parallel.optim.making import make_optimizer, partly
from shardwise.parallel.optim.optimizer_state import SHARED
from shardwise.parallel.optim.plain_state import decode, encode, tensors_in
from shardwise.parallel.optim.schedule import load_schedule_state, plain
from shardwise.parallel.servers.frames import Frame, Kind
from shardwise.parallel.servers.rows import mean
from shardwise.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Contribution:
    """Gradients that one worker pushed.

    Attributes:
        rank: rank of the worker.
        weight: weight of its gradients in a mean.
        losses: its losses, their sum first.
        tensors: see `rows`.
        sparse: names of the gradients that are sparse.
    """

    rank: int
    weight: float
    losses: tuple[float, ...]
    tensors: dict[str, Tensor]
    sparse: tuple[str, ...] = ()


@dataclass(slots=True)
class Shard:
    """State of one server.

    Attributes:
        parameters: its parameters by name.
        optimizer: the workload's optimizer over them.
        clocks: rank -> contributions that the worker has given.
        members: ranks of the workers that count.
        waiting: contributions that are in no update yet.
        joined: number of joint contributions of all members that are complete.
        settled: number of those for which it is decided whether they are applied.
        updates: number of updates applied.
        gradients: mean gradients of the last update or proof, by name; a missing one was used by nobody.
        losses: mean losses of the same, their sum first; empty before.
        square: squared norm of the mean gradients of the last update or proof, before clipping.
        settling: facts with which the last joint mean was settled; empty before.
        stop_at: clock at which all workers are to stop; 0: none.
        reason: why they are to stop: the number of a signal, or a message.
        generation: number of times that workers were started again and all went on together.
    """

    workload: Workload
    trained: Mapping[str, nn.Parameter]
    names: Sequence[str]
    workers: int
    parameters: dict[str, nn.Parameter] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    clocks: dict[int, int] = field(init=False)
    members: set[int] = field(init=False)
    waiting: list[Contribution] = field(init=False, default_factory=list)
    joined: int = field(init=False, default=0)
    settled: int = field(init=False, default=0)
    updates: int = field(init=False, default=0)
    gradients: dict[str, Tensor] = field(init=False, default_factory=dict)
    losses: tuple[float, ...] = field(init=False, default=())
    square: float = field(init=False, default=0.0)
    settling: dict[str, Any] = field(init=False, default_factory=dict)
    stop_at: int = field(init=False, default=0)
    reason: Any = field(init=False, default=None)
    generation: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.parameters = {
            name: nn.Parameter(torch.zeros(self.trained[name].shape, dtype=self.trained[name].dtype))
            for name in self.names
        }
        if all(name in self.parameters for name in self.trained):
            self.optimizer = make_optimizer(self.workload, {name: self.parameters[name] for name in self.trained})
        else:
            self.optimizer = partly(self.workload, self.trained, self.parameters)
        self.clocks = dict.fromkeys(range(self.workers), 0)
        self.members = set(range(self.workers))

    # ---- events ---------------------------------------------------------------------------------------------------

    def take(self, event: Frame) -> None:
        """Let an event take effect."""
        {
            Kind.PUSH: self._push,
            Kind.APPLY: self._apply,
            Kind.WRITE: self._write,
            Kind.ENTER: self._enter,
            Kind.DROP: self._drop,
            Kind.REGROUP: self._regroup,
            Kind.STATE: self._restore,
        }[event.kind](event)

    def is_new(self, event: Frame) -> bool:
        """Return whether a request of a worker has not taken effect yet: it asks again if an answer was lost."""
        if event.kind == Kind.PUSH:
            return bool(event.facts["clock"] == self.clocks[event.facts["rank"]])
        if event.kind == Kind.REGROUP:
            return bool(event.facts["generation"] > self.generation)
        return event.kind != Kind.APPLY or bool(self.joined > event.facts["clock"] >= self.settled)

    def _push(self, event: Frame) -> None:
        facts = event.facts
        rank = facts["rank"]
        self.clocks[rank] += 1
        self._set_options(facts.get("options") or [])
        if (reason := facts.get("stop")) and not self.stop_at:
            # nobody is past the largest clock, so all can still reach the next one
            self.stop_at, self.reason = max(self.clocks[each] for each in self.members) + 1, reason
        given = Contribution(
            rank,
            facts["weight"],
            tuple(facts["losses"]),
            event.tensors,
            tuple(facts.get("sparse", ())),
        )
        self.waiting.append(given)
        self._gather(together=facts["together"])

    def _gather(self, *, together: bool) -> None:
        """Join contributions once there are enough."""
        if together:
            if {each.rank for each in self.waiting} >= self.members and self.joined == self.settled:
                self._join(sorted(self.waiting, key=lambda each: each.rank))
                self.joined += 1
            return
        while len(self.waiting) >= len(self.members) > 0:
            taken, self.waiting = self.waiting[: len(self.members)], self.waiting[len(self.members) :]
            self._join(taken)
            self._update()

    def _join(self, contributions: Sequence[Contribution]) -> None:
        counted = [each for each in contributions if each.weight > 0] or list(contributions[:1])
        weighted = [(each.weight or 1.0, each.tensors, each.sparse) for each in counted]
        means = {name: mean(name, self.trained[name].shape, weighted) for name in self.names}
        self.gradients = {name: gradient for name, gradient in means.items() if gradient is not None}
        norms = [torch.linalg.vector_norm(_values(each)).double() for each in self.gradients.values()]
        self.square = float(torch.stack(norms).square().sum()) if norms else 0.0
        total = math.fsum(weight for weight, _, _ in weighted)
        self.losses = tuple(
            math.fsum(weight * loss for (weight, _, _), loss in zip(weighted, losses, strict=True)) / total
            for losses in zip(*(each.losses for each in counted), strict=True)
        )

    def _apply(self, event: Frame) -> None:
        """Settle the joint contributions of a clock: update by the mean times a factor, or not at all."""
        self.settled += 1
        self.waiting = []
        self.settling = {name: event.facts.get(name) for name in ("applied", "factor")}
        if event.facts["applied"]:
            if (factor := event.facts.get("factor")) is not None:
                for gradient in self.gradients.values():
                    gradient.mul_(factor)
            self._update()

    def _update(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients.get(name)
        self.optimizer.step()
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if self.workload.after_step is not None:
                changed(self.workload, name, parameter.detach())
        self.updates += 1

    def _enter(self, event: Frame) -> None:
        """Count a worker again that was dropped; it goes on at the given clock."""
        rank = event.facts["rank"]
        self.members.add(rank)
        self.clocks[rank] = event.facts["clock"]

    def _regroup(self, event: Frame) -> None:
        """Let all workers go on together from a number of settled joint means, after one was started again.

        The mean of one that the other servers have settled is settled here too, as there; all else is given again.
        """
        facts = event.facts
        self.generation = facts["generation"]
        if self.settled < facts["settled"]:
            self._apply(event)
        self.waiting, self.joined = [], self.settled
        self.members = set(range(self.workers))
        self.clocks = dict.fromkeys(self.clocks, facts["clock"])

    def _drop(self, event: Frame) -> None:
        """Count a worker no longer; nobody waits for it."""
        self.members.discard(event.facts["rank"])
        together = event.facts["together"]
        if self.waiting:
            self._gather(together=together)

    def _write(self, event: Frame) -> None:
        """Set parameters `p/NAME`, and the state of the optimizer: `s/NAME/PATH`, its plain values and numbers."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if (value := event.tensors.get(f"p/{name}")) is not None:
                    parameter.copy_(value)
        for name, values in event.facts.get("plain", {}).items():
            key = self.parameters.get(name) if name != SHARED else None
            tensors = {
                path.removeprefix(f"s/{name}/"): tensor
                for path, tensor in event.tensors.items()
                if path.startswith(f"s/{name}/")
            }
            decoded = {entry: decode(value, tensors) for entry, value in values.items()}
            state: Any = self.optimizer.state
            if key is not None:
                state[key].clear()
            (state if key is None else state[key]).update(decoded)
        self._set_options(event.facts.get("options") or [])

    def _set_options(self, options: Sequence[Mapping[str, Any]]) -> None:
        if options:
            load_schedule_state(self.optimizer, None, {"groups": options, "scheduler": None})

    # ---- answers --------------------------------------------------------------------------------------------------

    def slowest(self) -> int:
        """Return the least clock of the members."""
        return min((self.clocks[rank] for rank in self.members), default=0)

    def front(self) -> int:
        """Return the largest clock of the members; of all workers if there are none."""
        return max((self.clocks[rank] for rank in self.members or self.clocks), default=0)

    def shown_parameters(self) -> dict[str, Tensor]:
        """Return the parameters `p/NAME`; they share memory with those here."""
        return {f"p/{name}": parameter.detach() for name, parameter in self.parameters.items()}

    def shown_gradients(self) -> dict[str, Tensor]:
        """Return the mean gradients of the last update or proof, `g/NAME`, whole."""
        return {f"g/{name}": each.to_dense() if each.is_sparse else each for name, each in self.gradients.items()}

    def optimizer_state(self, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's state of parameters: tensors `s/NAME/PATH`, and by name what has no tensors' values.

        What the optimizer keeps for all parameters together has an empty name.
        """
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for name in names:
            state = self.optimizer.state.get(self.parameters[name], {})
            facts[name] = {key: encode(value, key) for key, value in state.items()}
            for key, value in state.items():
                tensors.update((f"s/{name}/{path}", each) for path, each in tensors_in(value, key))
        whole: Any = self.optimizer.state
        shared = {key: encode(value, key) for key, value in whole.items() if isinstance(key, str)}
        return tensors, facts | ({SHARED: shared} if shared else {})

    def options(self) -> list[dict[str, Any]]:
        """Return the numbers of the optimizer's groups, JSON-able."""
        return [plain({k: v for k, v in group.items() if k != "params"}) for group in self.optimizer.param_groups]

    # ---- the whole state ------------------------------------------------------------------------------------------

    def state(self) -> Frame:
        """Return the whole state as one frame."""
        tensors, plain_state = self.optimizer_state(self.names)
        tensors |= self.shown_parameters()
        tensors |= {f"m/{name.partition('/')[2]}": each for name, each in self.shown_gradients().items()}
        for number, each in enumerate(self.waiting):
            tensors |= {f"c/{number}/{name}": tensor for name, tensor in each.tensors.items()}
        facts = {
            "plain": plain_state,
            "options": self.options(),
            "clocks": sorted(self.clocks.items()),
            "members": sorted(self.members),
            "counts": [self.joined, self.settled, self.updates, self.stop_at, self.generation],
            "settling": self.settling,
            "reason": self.reason,
            "losses": list(self.losses),
            "square": self.square,
            "sparse": [name for name, each in self.gradients.items() if each.is_sparse],
            "waiting": [[e.rank, e.weight, list(e.losses), list(e.sparse)] for e in self.waiting],
        }
        return Frame(Kind.STATE, facts, tensors)

    def _restore(self, event: Frame) -> None:
        facts = event.facts
        self._write(replace(event, kind=Kind.WRITE))
        self.clocks = {int(rank): clock for rank, clock in facts["clocks"]}
        self.members = set(facts["members"])
        self.joined, self.settled, self.updates, self.stop_at, self.generation = facts["counts"]
        self.settling = facts["settling"]
        self.reason, self.losses, self.square = facts["reason"], tuple(facts["losses"]), facts["square"]
        self.gradients = {
            name: event.tensors[f"m/{name}"].to_sparse(1) if name in facts["sparse"] else event.tensors[f"m/{name}"]
            for name in self.names
            if f"m/{name}" in event.tensors
        }
        self.waiting = []
        for number, (rank, weight, losses, sparse) in enumerate(facts["waiting"]):
            start = f"c/{number}/"
            own = {name.removeprefix(start): t for name, t in event.tensors.items() if name.startswith(start)}
            self.waiting.append(Contribution(rank, weight, tuple(losses), own, tuple(sparse)))


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient
