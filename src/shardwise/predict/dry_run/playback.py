"""Seconds of a step from dry runs of its workers: the events that the real program issued, priced and played.

    kernels         on the streams on which the program put them, each stretch between two waits as one operation
    collectives     on a stream for each group; they begin when all simulated members are ready
    messages        the send of one worker and the recv of another, paired by their tags
    waits           as the program made them; see `streams`

Prices are those of the closed form (`segment_times.Seconds`, `CommunicationTimes`), and the rules of streams and hosts
those of the timeline (`timeline.events`): only the sequence of events is the program's own. Of each pipeline rank one
worker is played, the first; the others in its replica and in other replicas do the same at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shardwise.collective import Collective
from shardwise.parallel.pipeline.executor import channel_of
from shardwise.predict.closed_form.segment_times import PassSeconds, Seconds
from shardwise.predict.closed_form.step_time import Costs, unhidden
from shardwise.predict.dry_run.dry_run import DryRun
from shardwise.predict.dry_run.recorder import AVERAGE, Event
from shardwise.predict.dry_run.streams import COMPUTE as MAIN
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import LayerPass
from shardwise.predict.timeline.events import COMPUTE, Deadlock, Operation, Simulation


def step_seconds(costs: Costs, runs: Sequence[DryRun]) -> float:
    """Return the seconds of a step, played from dry runs of all its pipeline workers.

    Args:
        costs: costs of the strategy, which price the events.
        runs: dry run of the first worker of each pipeline rank, in order.
    """
    strategy, seconds = costs.strategy, played(costs, runs).run()
    if not strategy.local:
        return seconds
    usual = played(costs, [without_average(run) for run in runs]).run()
    exposed = unhidden(seconds - usual, strategy.delay * usual, costs.stages.overlap)
    return usual + exposed * strategy.fragments / strategy.local


def without_average(run: DryRun) -> DryRun:
    """Return a dry run without the average that ends its step."""
    events = tuple(event for event in run.events if event.mark != AVERAGE)
    return replace(run, record=replace(run.record, events=events))


def played(costs: Costs, runs: Sequence[DryRun]) -> Simulation:
    """Issue the events of all workers to a simulation, which is ready to run. Arguments as of `step_seconds`.

    Raises:
        Deadlock: a worker takes part in a collective or message that another one never reaches.
    """
    simulation = Simulation([costs.stages.overlap] * len(runs))
    ranks = [run.rank for run in runs]
    together: Counter[object] = Counter()
    for number, run in enumerate(runs):
        _Player(simulation, number, ranks, Prices(costs, number), together).play(run.events)
    alone = next((key for key, missing in together.items() if missing), None)
    if alone is not None:
        raise Deadlock(f"{alone} of a dry run waits for a worker that never takes part")
    return simulation


class Prices:
    """Seconds of the events of one worker, by the functions of the closed form.

    Args:
        costs: costs of the strategy.
        pipeline_rank: pipeline rank of the worker.
    """

    def __init__(self, costs: Costs, pipeline_rank: int) -> None:
        own = costs.at(costs.parts.workers[pipeline_rank])
        self.strategy, self.times, self._calls = costs.strategy, own.times, own.calls
        self._seconds = Seconds.on(costs.profile, costs.cluster, self.strategy, own.times.device)
        self._known: dict[Kernel, PassSeconds] = {}

    def kernel(self, kernel: Kernel) -> PassSeconds:
        """Return the seconds of a kernel, with its launch and what recomputation adds to it."""
        if kernel not in self._known:
            alone = LayerPass((kernel,))
            self._known[kernel] = self._seconds.of(alone)
            if kernel.when == "recompute" or self._is_saved(kernel):
                self._known[kernel] += self._seconds.watched(alone, products=self.strategy.saves_products)
        return self._known[kernel]

    def _is_saved(self, kernel: Kernel) -> bool:
        """Return whether selective recomputation watches a kernel in the forward pass, to keep its result.

        Outside of blocks nothing is recomputed: the few products there count as well, for a kernel does not say where
        it is.
        """
        return self.strategy.saves_products and kernel.when == "forward" and kernel.product

    def collective(self, collective: Collective) -> float:
        """Return the seconds of a collective whose members start together."""
        if collective.operation in ("send", "recv"):
            return self._calls.sent(collective.bytes, collective.group)
        return self._calls.collective(collective.operation, collective.bytes, collective.group)

    def launching(self, collective: Collective) -> float:
        """Return the host's seconds to issue a collective."""
        return self.times.overhead("exchange").launching if collective.axis == "tp" else 0.0

    def around(self, events: Iterable[Event]) -> PassSeconds:
        """Return the host's seconds for one part of the step as a whole, given all its events or none."""
        events = list(events)
        if not events:
            return PassSeconds()
        if events[0].mark == "update":
            return PassSeconds(kernels=self.times.overhead("step").launching + self.times.crowding)
        if not events[0].mark[:1].isdigit():
            return PassSeconds()
        found = PassSeconds() if self.strategy.runs_module else self.times.overhead("stage")
        counts = Counter(event.what.operation for event in events if _is_sharding(event.what))
        return found + self.times.overhead("sharded", max(counts.values(), default=0))


def _is_sharding(what: Kernel | Collective) -> bool:
    return isinstance(what, Collective) and what.operation in ("all_gather", "reduce_scatter") and what.axis == "fsdp"


@dataclass
class _Stretch:
    """Consecutive events of one stream that no other event waits for, except for the last: one operation."""

    stream: int
    mark: str
    after: list[Operation]
    indices: list[int] = field(default_factory=list)
    spent: PassSeconds = field(default_factory=PassSeconds)


class _Player:
    """Issues the events of one worker.

    Args:
        simulation: the simulation of all workers.
        number: number of the worker in it.
        ranks: rank of each worker in it.
        prices: seconds of the worker's events.
        together: for each collective of several workers in it, how many of them have not been met yet.
    """

    def __init__(
        self, simulation: Simulation, number: int, ranks: Sequence[int], prices: Prices, together: Counter[object]
    ) -> None:
        self.simulation, self.number, self.ranks, self.prices = simulation, number, ranks, prices
        self.together = together
        self.inline = prices.times.device.kind == "cpu"
        self._operations: dict[int, Operation] = {}
        self._stretch: _Stretch | None = None
        self._met: Counter[object] = Counter()

    def play(self, events: Sequence[Event]) -> None:
        """Issue all events, in order."""
        parts: dict[str, list[Event]] = {}
        for event in events:
            parts.setdefault(event.mark, []).append(event)
        awaited = {index for event in events for index in event.after}
        for index, event in enumerate(events):
            part = parts.pop(event.mark, [])
            if isinstance(event.what, Kernel):
                self._kernel(index, event, self.prices.kernel(event.what) + self.prices.around(part))
                if index in awaited:
                    self._close()
            else:
                self._collective(index, event, event.what)
        self._close()

    def _kernel(self, index: int, event: Event, spent: PassSeconds) -> None:
        stretch = self._stretch
        if stretch is None or event.after or (stretch.stream, stretch.mark) != (event.stream, event.mark):
            self._close()
            stretch = self._stretch = _Stretch(event.stream, event.mark, self._needed(event))
        stretch.indices.append(index)
        stretch.spent += spent

    def _close(self) -> None:
        """Issue the stretch of kernels that is open, if there is one."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return
        spent, stream = stretch.spent, COMPUTE if stretch.stream == MAIN else f"stream {stretch.stream}"
        operation = Operation(
            self.number,
            stream,
            stretch.mark,
            "kernels",
            spent.kernels + (spent.launching if self.inline else 0.0),
            launch=0.0 if self.inline else spent.launching,
            alone=0.0 if self.inline else spent.total,
            hosted=spent.launching if self.inline else 0.0,
        )
        self._operations.update(dict.fromkeys(stretch.indices, operation))
        self.simulation.issue(operation, stretch.after)
        if self.inline:
            self.simulation.wait(self.number, operation)

    def _needed(self, event: Event) -> list[Operation]:
        """Return the operations that an event waits for; on a CPU the host waits for them at once."""
        found = list({id(self._operations[index]): self._operations[index] for index in event.after}.values())
        for operation in found if self.inline else ():
            self.simulation.wait(self.number, operation)
        return found

    def _collective(self, index: int, event: Event, what: Collective) -> None:
        self._close()
        launching = self.prices.launching(what)
        if self.inline and launching:
            self._kernel(-1, Event(event.mark, what, MAIN), PassSeconds(launching=launching, inline=True))
            self._close()
        message = what.operation in ("send", "recv")
        stream = f"pp {channel_of(what.tag)}" if message else f"{what.axis} {what.group}"
        operation = Operation(
            self.number,
            stream,
            f"{what.operation} {event.mark}".rstrip(),
            "message" if message else what.operation,
            self.prices.collective(what),
            launch=0.0 if self.inline else launching,
            crowds=not message,
            notes={"bytes": what.bytes},
        )
        self._operations[index] = self.simulation.issue(operation, self._needed(event), self._together(what))

    def _together(self, what: Collective) -> object:
        """Return the key that a collective has on all simulated workers that take part; None if there is one only."""
        members = sum(rank in what.group.ranks for rank in self.ranks)
        if members < 2:
            return None
        key: object = (what.operation, what.group)
        if what.operation in ("send", "recv"):
            key = ("message", what.group, what.tag)
        self._met[key] += 1
        met = key, self._met[key]
        self.together[met] = (self.together[met] or members) - 1
        return met
