"""Update by parameter servers: this worker's connection to them, and the servers that run beside it.

A worker sends the gradients of its samples, and gets back updated parameters. What it has of the optimizer are the
groups with their numbers, which a schedule moves, and, for a checkpoint, the state of the parameters that it writes.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import NotFinite, RequestError, StrategyError
from shardwise.launch import regroup
from shardwise.launch.beside import STATE_FOLDER, Beside, listen
from shardwise.launch.context import rank_context
from shardwise.launch.sending import written
from shardwise.parallel.engine import Engine
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.optim.optimizer_state import SHARED
from shardwise.parallel.optim.plain_state import decode, encode, tensors_in
from shardwise.parallel.optim.schedule import load_schedule_state, plain
from shardwise.parallel.servers.client import ServerGroup
from shardwise.parallel.servers.frames import Frame, Kind
from shardwise.parallel.servers.handshake import chosen_token
from shardwise.parallel.servers.rows import contribution
from shardwise.parallel.servers.server import ABSENT_SECONDS, ServerSetup, run_server
from shardwise.parallel.state.gather import anywhere, gather_json
from shardwise.splitting.servers import host_rank, server_of
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload, not_given

HOST_SETTING = "SHARDWISE_SERVER_HOST"
"""Environment variable with the address of this host on which its parameter servers listen."""

LOOPBACK = "127.0.0.1"
"""Address on which servers listen unless they are told."""

EVERYWHERE = ("0.0.0.0", "::", "")
"""Addresses that name no host: others could not connect to them."""


DEAD_SECONDS = 1.0
"""Seconds without a connection after which a worker counts as dead where killed workers are started again."""


@dataclass(frozen=True, slots=True)
class _ServerAddresses:
    """Servers of this process's training, for a worker that joins later."""

    addresses: list[tuple[str, int]]
    token: str


_known: list[_ServerAddresses] = []

_held: list[ServerGroup] = []
"""Connections of a program that has ended because workers meet again, until the next one has connected."""


class ServedParameters:
    """The parameter servers of a training, as one worker sees them. Building it is collective.

    Attributes:
        mine: names of the parameters whose values and states this worker writes to checkpoints.
        clock: number of contributions that this worker has given.
        stop_at: clock at which all workers are to stop; 0: none.
        stop_reason: why: the number of a signal, or a message.

    Raises:
        StrategyError: there are more servers than parameters.
        RequestError: servers cannot listen where they are told to, or their token is too short.
    """

    def __init__(self, workload: Workload, strategy: Strategy, mesh: Mesh, engine: Engine) -> None:
        self._strategy, self._mesh, self._engine = strategy, mesh, engine
        self.mine = [name for name in engine.parameters if engine.held[name].writes]
        self._options: list[dict[str, Any]] = []
        self._mirrored = self._met = -1
        self.stop_at, self.stop_reason = 0, None
        sizes = {name: parameter.numel() for name, parameter in engine.parameters.items()}
        if strategy.ps > len(sizes):
            raise StrategyError(too_many_servers(strategy, len(sizes)))
        owners = server_of(sizes, strategy.ps)
        if regroup.generation():
            self._hosted: dict[int, Beside] = {}
            self._go_on(owners)
            return
        hosted, addresses, token = self._start(workload, owners)
        self._servers = ServerGroup(addresses, token, mesh.rank, owners)
        self._end = weakref.finalize(self, _end, self._servers, list(hosted.values()))
        self._hosted = hosted
        _known.append(_ServerAddresses(addresses, token))
        self.write()

    def _go_on(self, owners: Mapping[str, int]) -> None:
        """Connect to the servers again after a worker was started again, and go on where they stand. Collective."""
        mesh, strategy = self._mesh, self._strategy
        assert mesh.world is not None
        mine = asdict(_known[-1]) if _known else None
        everybody = gather_json(mine, mesh.world, mesh.device)
        found = next(each for each in everybody if each is not None)
        known = _ServerAddresses([(host, port) for host, port in found["addresses"]], found["token"])
        again = mine is None and strategy.stale
        self._servers = ServerGroup(known.addresses, known.token, mesh.rank, owners, again=again)
        self._end = weakref.finalize(self, _end, self._servers, [])
        _known[:] = [known]
        while _held:
            _held.pop().close()
        self._all_done()  # now all are connected, and what the connections before them have asked is over
        if not strategy.stale:
            settled = int(max(gather_json(self._servers.settled, mesh.world, mesh.device)))
            if mesh.rank == 0:
                self._servers.regroup(regroup.generation())
            self._servers.begin_at(settled)
            self._all_done()
        self._take(self._read("parameters"))
        self._all_done()

    @property
    def clock(self) -> int:
        """Return the number of contributions that this worker has given."""
        return int(self._servers.clock)

    @property
    def left_out(self) -> int:
        """Return the contributions that this worker has left out, because it was away while the others went on."""
        return int(self._servers.left_out)

    @property
    def hosted(self) -> Mapping[int, Beside]:
        """Return the processes of the servers that run beside this worker, by their numbers."""
        return self._hosted

    def _start(
        self, workload: Workload, owners: Mapping[str, int]
    ) -> tuple[dict[int, Beside], list[tuple[str, int]], str]:
        """Start the servers of this worker. Returns them, and all addresses and the token. Collective."""
        mesh, strategy = self._mesh, self._strategy
        assert mesh.world is not None
        token, problem = "", ""
        listeners = {}
        try:
            token = chosen_token() if mesh.rank == 0 else ""
            for number in range(strategy.ps):
                if host_rank(number, strategy.workers) == mesh.rank:
                    listeners[number] = _listening()
        except RequestError as error:
            problem = str(error)
        mine = {str(number): listener.getsockname()[:2] for number, listener in listeners.items()}
        everybody = gather_json({"token": token, "problem": problem, "addresses": mine}, mesh.world, mesh.device)
        if found := next((each["problem"] for each in everybody if each["problem"]), ""):
            raise RequestError(found)
        token = everybody[0]["token"]
        addresses = {int(number): tuple(at) for each in everybody for number, at in each["addresses"].items()}
        hosted = {}
        for number, listener in listeners.items():
            setup = ServerSetup(
                workload=_for_server(workload),
                trained=dict(self._engine.trained),
                names=tuple(name for name in self._engine.trained if owners[name] == number),
                workers=strategy.workers,
                token=token,
                staleness=strategy.staleness.steps,
                folder=tempfile.mkdtemp(prefix="shardwise-server-", dir=os.environ.get(STATE_FOLDER)),
                threads=torch.get_num_threads(),
                absent_seconds=_absent_seconds(strategy),
            )
            if (keep := regroup.keeper()) is None:
                hosted[number] = Beside(run_server, (setup,), listener, setup.folder)
            else:
                keep(written((run_server, (setup,))), listener, setup.folder)
        return hosted, [addresses[number] for number in range(strategy.ps)], token

    # ---- steps ----------------------------------------------------------------------------------------------------

    def join(self, losses: Sequence[float], optimizer: torch.optim.Optimizer | None) -> float:
        """Give our gradients to the mean of all workers'. Returns its squared norm. Collective.

        Args:
            losses: losses of this worker, their sum first.
            optimizer: its groups have the numbers of the update; None for a mean that is for no update.
        """
        answers = self._push(self._gradients(), losses, 1.0, optimizer, together=True)
        return sum(float(answer.facts["square"]) for answer in answers)

    def settle(self, *, applied: bool, factor: float | None = None) -> None:
        """Update all parameters by the mean of `join` times `factor`, or not at all. Collective."""
        self._take(self._servers.apply(applied=applied, factor=factor))

    def give(
        self,
        gradients: Mapping[str, Tensor],
        losses: Sequence[float],
        weight: float,
        optimizer: torch.optim.Optimizer,
        stop: int | str = 0,
    ) -> tuple[float, ...]:
        """Give gradients of this worker alone, and take the parameters as they are once it may take its next step.

        Args:
            gradients: its gradients by name.
            losses: its losses, their sum first.
            weight: weight of both in means with those of other workers; 0 counts for nothing.
            optimizer: its groups have the numbers of the update.
            stop: reason for which all workers are to stop: a signal, or a message.

        Returns the mean losses of the last update; our own before the first.
        """
        answers = self._push(gradients, losses, weight, optimizer, together=False, stop=stop)
        self._take(answers)
        facts = answers[0].facts
        self.stop_at, self.stop_reason = facts["stop_at"], facts["reason"]
        return tuple(facts["losses"]) or tuple(losses)

    def check_stop(self) -> int:
        """Return the signal on which all workers stop at this clock; 0 if they go on.

        Raises:
            NotFinite: they stop because a loss or a gradient of one is not finite.
        """
        if not self.stop_at or self.clock < self.stop_at:
            return 0
        if isinstance(self.stop_reason, str):
            raise NotFinite(self.stop_reason)
        return int(self.stop_reason or 0)

    def meet(self) -> None:
        """Wait until all workers have taken as many steps, and take the parameters, then equal. Collective."""
        if self._met == self.clock:
            return
        self._take(self._servers.ask(Kind.WAIT))
        self._met = self.clock
        self._all_done()  # nobody goes on, and changes them, before all have taken them

    def show_gradients(self) -> None:
        """Let `.grad` of the parameters be the mean gradients of the last update or proof. Collective."""
        found = {name: each for answer in self._read("gradients") for name, each in answer.tensors.items()}
        for name, parameter in self._engine.parameters.items():
            gradient = found.get(f"g/{name}")
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self._all_done()

    def _gradients(self) -> dict[str, Tensor]:
        return {name: each.grad for name, each in self._engine.parameters.items() if each.grad is not None}

    def _push(
        self,
        gradients: Mapping[str, Tensor],
        losses: Sequence[float],
        weight: float,
        optimizer: torch.optim.Optimizer | None,
        *,
        together: bool,
        stop: int | str = 0,
    ) -> list[Frame]:
        tensors, sparse = contribution(gradients)
        options = [] if optimizer is None else self._changed_options(optimizer)
        facts = {"weight": weight, "losses": list(losses), "sparse": sparse, "options": options, "stop": stop}
        return self._servers.push(facts, tensors, together=together)

    @torch.no_grad()
    def _take(self, answers: Sequence[Frame]) -> None:
        """Give the parameters the values in answers that have some."""
        for answer in answers:
            for path, value in answer.tensors.items():
                self._engine.parameters[path.partition("/")[2]].copy_(value)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def mirror(self, optimizer: torch.optim.Optimizer, here: Mapping[str, nn.Parameter]) -> None:
        """Give this worker's optimizer the state that the servers have of the parameters `here`. Collective."""
        if self._mirrored == self.clock:
            return
        state: Any = optimizer.state
        for answer in self._read("state", list(here)):
            for name, values in answer.facts["plain"].items():
                start = f"s/{name}/"
                own = {k.removeprefix(start): t for k, t in answer.tensors.items() if k.startswith(start)}
                decoded = {key: decode(value, own) for key, value in values.items()}
                (state if name == SHARED else state[here[name]]).update(decoded)
            self._take_numbers(optimizer, answer.facts["options"])
        self._mirrored = self.clock
        self._all_done()

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Free the state that `mirror` gave to this worker's optimizer."""
        if self._mirrored >= 0:
            optimizer.state.clear()
            self._mirrored = -1

    def write(
        self, optimizer: torch.optim.Optimizer | None = None, here: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        """Give the servers the parameters as they are here, and an optimizer's state and numbers. Collective.

        Each worker sends what it writes to checkpoints; all hold equal parameters.
        """
        tensors = {f"p/{name}": self._engine.parameters[name].detach() for name in self.mine}
        states: dict[str, dict[str, Any]] = {}
        if optimizer is not None:
            for name, parameter in (here or {}).items():
                found = optimizer.state.get(parameter, {})
                states[name] = {key: encode(value, key) for key, value in found.items()}
                for key, value in found.items():
                    tensors.update((f"s/{name}/{path}", each) for path, each in tensors_in(value, key))
            whole: Any = optimizer.state
            shared = {key: encode(value, key) for key, value in whole.items() if isinstance(key, str)}
            states |= {SHARED: shared} if shared else {}
            self._options, self._mirrored = _numbers(optimizer), self.clock
        options = self._options if optimizer is not None else []

        def facts(number: int) -> dict[str, Any]:
            own = {*self._servers.owned(number, [name for name in states if name != SHARED]), SHARED}
            return {"plain": {name: each for name, each in states.items() if name in own}, "options": options}

        self._servers.ask(Kind.WRITE, facts, tensors)
        self._all_done()

    def _read(self, what: str, names: Sequence[str] = ()) -> list[Frame]:
        return self._servers.ask(Kind.READ, lambda number: {"what": what, "names": self._servers.owned(number, names)})

    def _changed_options(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Return the numbers of the groups that have changed since the servers were told, by group; or nothing."""
        now, known = _numbers(optimizer), self._options
        known = known or [{} for _ in now]
        self._options = now
        changed = [{k: v for k, v in group.items() if v != old.get(k)} for group, old in zip(now, known, strict=True)]
        return changed if any(changed) else []

    def _take_numbers(self, optimizer: torch.optim.Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
        """Take over the numbers of groups that the optimizer itself has changed on the servers."""
        if not self._options:
            return
        own = [{k: v for k, v in g.items() if v != old.get(k)} for g, old in zip(options, self._options, strict=True)]
        if any(own):
            load_schedule_state(optimizer, None, {"groups": own, "scheduler": None})
            self._options = [{**old, **new} for old, new in zip(self._options, own, strict=True)]

    def _all_done(self) -> None:
        """Wait for all workers: the servers beside one end with it, and others may still ask them."""
        assert self._mesh.world is not None
        anywhere([False], self._mesh.world, self._mesh.device)


def too_many_servers(strategy: Strategy, parameters: int) -> str:
    """Return the message that a model has fewer trained parameters than servers."""
    return f"ps={strategy.ps}: the model has {parameters} trained parameters: use ps={parameters} or fewer"


def check_served(workload: Workload, strategy: Strategy, *, together: bool) -> None:
    """Check that parameter servers can train a workload.

    Args:
        workload: the workload.
        strategy: strategy with parameter servers.
        together: whether the optimizer looks at all parameters to update each.

    Raises:
        StrategyError: they cannot; the message says what would do.
    """
    what = f"workload {workload.name!r}"
    if workload.turns:
        raise StrategyError(f"ps={strategy.ps}: {what} has a step of several turns, which servers do not know: use dp")
    if together and strategy.ps > 1:
        raise StrategyError(
            f"ps={strategy.ps}: the optimizer of {what} looks at all parameters to update each: use ps=1, or dp alone"
        )
    if not strategy.stale:
        return
    for name, given in (("whole_batch", workload.whole_batch), ("average", workload.average is not None)):
        if given:
            raise StrategyError(
                f"staleness={strategy.staleness}: {name} of {what} needs all workers at the same step: use staleness=0"
            )


def _listening() -> Any:
    """Return a socket for a server to listen on. Raises RequestError."""
    context, host = rank_context(), os.environ.get(HOST_SETTING)
    if host is None and context is not None and not context.one_host:
        raise RequestError(
            f"the workers may be on several hosts, and parameter servers listen on {LOOPBACK} alone: set "
            f"{HOST_SETTING} on each host to its address in the network of the workers"
        )
    if host in EVERYWHERE:
        raise RequestError(f"{HOST_SETTING}={host}: give the one address of this host that the workers connect to")
    try:
        return listen(host or LOOPBACK)
    except OSError as error:
        raise RequestError(
            f"{HOST_SETTING}={host}: this host cannot listen there ({error.strerror or error}): use its own address"
        ) from None


def _for_server(workload: Workload) -> Workload:
    """Return what a server needs of a workload: its optimizer, and what it does after an update."""
    return replace(
        workload,
        model=not_given,
        dataset=(),
        inputs=_unused,
        loss=_unused,
        step=None,
        weight=None,
        whole_batch=False,
        collate=None,
        schedule=None,
        schedule_every="step",
        evaluation=None,
        stop=None,
        callbacks=(),
        weights=None,
    )


def _absent_seconds(strategy: Strategy) -> float:
    """Return the seconds without a connection after which a worker is dropped.

    Where killed workers are started again, one that is gone has died: the others go on at once, or, where each update
    needs all of them, wait for it.
    """
    if not regroup.possible():
        return ABSENT_SECONDS
    return DEAD_SECONDS if strategy.stale else math.inf


def _unused(*_: Any) -> Any:
    raise AssertionError("servers compute no loss")


def _numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the numbers of an optimizer's groups, JSON-able."""
    return [plain({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def _end(servers: ServerGroup, hosted: Sequence[Beside]) -> None:
    if regroup.lost():  # servers would count this worker as gone, too, until it connects again
        _held.append(servers)
        return
    servers.close()
    for each in hosted:
        each.close()
