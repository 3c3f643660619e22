"""Count the collectives and messages that every pipeline worker issues in one step.

The dry run counts them by running the program; both must agree to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from shardwise.predict.profile.profile import Exchanged, Profile
from shardwise.predict.workers.buckets import Gathered
from shardwise.predict.workers.groups import replica_axis
from shardwise.predict.workers.holdings import Parts, Stage, Worker, report_bytes
from shardwise.predict.workers.passes import Sync, actions_of, syncs
from shardwise.splitting.schedule import FORWARD, Action

Key = tuple[str, str, str]
"""Key of a count: (operation, axis, when), as in `collective.Collective`."""


def communicated(profile: Profile, parts: Parts, pipeline_rank: int = 0) -> Mapping[Key, tuple[int, int]]:
    """Count the collectives of pipeline worker `pipeline_rank` in one step: (operation, axis, when) -> (number, bytes).

    Axes, phases and bytes are those of `collective.Collective`.
    """
    return _Counting(profile, parts, parts.workers[pipeline_rank]).counted()


class _Counting:
    def __init__(self, profile: Profile, parts: Parts, worker: Worker) -> None:
        self.profile, self.parts, self.worker, self.strategy = profile, parts, worker, parts.strategy
        self._counts: Counter[Key] = Counter()
        self._bytes: Counter[Key] = Counter()

    def counted(self) -> Mapping[Key, tuple[int, int]]:
        """Return the counts of one worker; see `communicated`."""
        strategy = self.strategy
        actions = actions_of(strategy, self.worker.pipeline_rank)
        stages = {stage.number: stage for stage in self.worker.stages}
        for stage in self.worker.stages:
            self._exchanges(stage)
            self._messages(stage)
            self._add("all_reduce", replica_axis(strategy), "backward", (bucket.bytes for bucket in stage.buckets))
        if strategy.splits_parameters:
            for action, sync in zip(actions, syncs(strategy, actions), strict=True):
                self._sync(stages[action.stage], action, sync)
        self._add("all_reduce", replica_axis(strategy), "backward", (bucket.bytes for bucket in self.worker.twice))
        if strategy.tp > 1:
            self._add("all_reduce", "tp", "backward", self.worker.summed)
        self._add("all_reduce", "pp", "backward", (size for _, size in self.worker.tied))
        self._add("broadcast", replica_axis(strategy), "optimizer", self.worker.broadcast)
        if strategy.workers > 1:
            self._add("all_reduce", "world", "report", [report_bytes(self.profile)])
        if self.profile.weighted and strategy.replicas > 1:
            self._add("all_reduce", replica_axis(strategy), "weight", [8])
        return {key: (count, self._bytes[key]) for key, count in self._counts.items()}

    def _add(self, operation: str, axis: str, when: str, sizes: Iterable[int], times: int = 1) -> None:
        for size in sizes:
            self._counts[operation, axis, when] += times
            self._bytes[operation, axis, when] += times * size

    def _exchanges(self, stage: Stage) -> None:
        """Count the collectives of tensor parallelism and batch norms of one stage, recomputation included."""
        times = self.strategy.microbatches
        for segment in self.profile.segments[stage.first : stage.end]:
            layer = segment.layer
            self._passed(layer.forward.exchanges, "forward", times)
            self._passed((*layer.backward.exchanges, *layer.weights.exchanges), "backward", times)
            self._norms(layer.normalised, "forward", "backward", times)
        for block in stage.recomputed:
            self._again(block.first, block.end, times)

    def _again(self, first: int, end: int, times: int) -> None:
        layers = [segment.layer for segment in self.profile.segments[first:end]]
        saved = [number for number, layer in enumerate(layers) if layer.saves]
        for layer in layers[: saved[-1]] if saved else []:
            self._passed(layer.forward.exchanges, "recompute", times)
            self._norms(layer.normalised, "recompute", "", times)
        if saved:
            self._passed(layers[saved[-1]].recomputed.exchanges, "recompute", times)
            self._norms(layers[saved[-1]].normalised, "recompute", "", times)

    def _passed(self, exchanges: Iterable[Exchanged], when: str, times: int) -> None:
        for exchange in exchanges:
            self._add(exchange.operation, "tp", when, [exchange.bytes], times)

    def _norms(self, channels: Iterable[int], there: str, back: str, times: int) -> None:
        if self.strategy.replicas == 1:
            return
        axis = replica_axis(self.strategy)
        for count in channels:
            self._add("all_gather", axis, there, [4 * self.strategy.replicas * (2 * count + 1)], times)
            if back:
                self._add("all_reduce", axis, back, [4 * 2 * count], times)

    def _messages(self, stage: Stage) -> None:
        times, pp = self.strategy.microbatches, self.strategy.pp
        pipeline_rank = stage.number % pp
        for target, sizes in stage.sent:
            if target % pp != pipeline_rank:
                self._add("send", "pp", "forward", sizes, times)
        for target, sizes in stage.returned:
            if target % pp != pipeline_rank:
                self._add("send", "pp", "backward", sizes, times)
        for other in self.parts.stages.values():
            if other.number % pp == pipeline_rank:
                continue
            for target, sizes in other.sent:
                if target == stage.number:
                    self._add("recv", "pp", "forward", sizes, times)
            for target, sizes in other.returned:
                if target == stage.number:
                    self._add("recv", "pp", "backward", sizes, times)

    def _sync(self, stage: Stage, action: Action, sync: Sync) -> None:
        when = "forward" if action.kind == FORWARD else "backward"
        groups: list[tuple[Gathered | None, bool]] = [(block.gathered, sync.blocks) for block in stage.blocks]
        for group, gathers in [*groups, (stage.root, sync.root)]:
            if group is None:
                continue
            if gathers:
                self._add("all_gather", "fsdp", when, [group.gather])
            if sync.reduces and group.reduce:
                self._add("reduce_scatter", "fsdp", "backward", [group.reduce])
                if self.strategy.dp > 1:
                    self._add("all_reduce", "dp", "backward", [group.reduce // self.strategy.fsdp])
