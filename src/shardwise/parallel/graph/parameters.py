"""Tensors that one worker holds of a module cut over workers, and the reduction of their gradients.

cut by tensor parallelism        gradients of the shards are complete; of replicated tensors used in parts: summed over
tp
on several replicas              summed over the replicas in buckets, or sharded by `fully_shard`, which averages
on several stages (tied)         summed over the workers that hold the tensor
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.data.gradient_reducer import GradientReducer, sum_gradients
from shardwise.parallel.data.joining import Joining
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.operators.graph_operators import GraphOperators
from shardwise.parallel.pipeline.stage import StageModule, StepWork
from shardwise.parallel.state.dtensor_rows import is_split, local, row_layout
from shardwise.parallel.state.gather import anywhere
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.parallel.state.materialize import materialize, read_weights
from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.partitioner import LocalGraph
from shardwise.parallel.tensor.placement import Placement, Sharded
from shardwise.splitting.balance import recomputed_blocks
from shardwise.splitting.ownership import assign_owners
from shardwise.strategy import Strategy
from shardwise.workload.precision import Copies
from shardwise.workload.weight_files import Weights


class LocalStages:
    """Stages of one worker with their tensors.

    Attributes:
        stages: this worker's stages by stage index.
        sharded: whether `fully_shard` splits the parameters.
        loss_factor: factor of the losses that turns averaged gradients into sums: the number of replicas if sharded,
            else 1.
    """

    def __init__(
        self,
        works: Sequence[StepWork],
        tensors: Mapping[str, Tensor],
        graph: LocalGraph,
        strategy: Strategy,
        mesh: Mesh,
        exchange: Exchange,
        operators: GraphOperators,
        joining: Joining | None,
        *,
        copies: Copies,
        narrow: bool = False,
        whole: Collection[str] = (),
        weights: Weights | None = None,
    ) -> None:
        self._strategy, self._mesh, self._joining, self._copies = strategy, mesh, joining, copies
        self._placements, self._shapes = graph.placements, {name: t.shape for name, t in tensors.items()}
        self._homes = _homes(works, tensors)
        self._trained = {n for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
        self.sharded = strategy.splits_parameters
        self.loss_factor = strategy.replicas if self.sharded else 1
        work = works[0]
        count = len(work.stages)
        own = range(mesh.coordinate("pp"), count, strategy.pp)
        mine = {name: _cut(tensors[name], graph.placements.get(name), exchange) for name in self._on(own)}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self.stages = {stage: self._build(stage, len(work.stages[stage].blocks), mine, operators) for stage in own}
        self._twice = self._on_several(own)
        self._tied = self._tied_groups()
        self._given: dict[dist.ProcessGroup, list[str]] = {}
        self._whole = [name for name in mine if self.sharded and (mine[name].dim() == 0 or name in whole)]
        if self.sharded:
            self._share(mine, narrow=narrow)
        if weights is not None:
            self._read(weights)
        self._reducers = self._make_reducers()

    def _share(self, mine: Mapping[str, Tensor], *, narrow: bool) -> None:
        """Let `fully_shard` split the parameters of each stage."""
        from shardwise.parallel.data.fsdp import check_dtypes, gather_next, join_by, parameter_groups, split_parameters

        joining = self._joining
        assert joining is not None
        check_dtypes((tensor for tensor in mine.values() if isinstance(tensor, nn.Parameter)), self._strategy)
        left = {self._tensor(name) for name in self._whole}
        for stage in self.stages.values():
            unsplit = [parameter for parameter in stage.parameters() if parameter in left]
            split_parameters(stage, stage.blocks, self._mesh, unsplit, joining, narrow=narrow)
            gather_next(stage, stage.blocks)
            for group in parameter_groups(stage):
                join_by(group, joining, self._name_of)

    def _name_of(self, parameter: nn.Parameter) -> str:
        """Return the name of a parameter in the plain module."""
        return next(name for name in self._owners if self._tensor(name) is parameter)

    # ---- which tensors where ----------------------------------------------------------------------------------------

    def _on(self, stages: Iterable[int]) -> list[str]:
        """Return the names of the tensors that any of these stages uses, in the order of the module."""
        wanted = set(stages)
        return [name for name, homes in self._homes.items() if any(stage in wanted for stage, _ in homes)]

    def _on_several(self, own: Iterable[int]) -> list[str]:
        """Return the names of the tensors that several stages of this worker use.

        Raises:
            StrategyError: there is such a tensor and fsdp would have to shard it twice.
        """
        stages = set(own)
        found = [n for n, homes in self._homes.items() if len({s for s, _ in homes if s in stages}) > 1]
        if found and self.sharded:
            raise StrategyError(
                f"{found[0]} is used in several stages of one worker: fsdp cannot shard it twice: use zero=1, or "
                "schedule=1f1b"
            )
        return found

    def _build(self, stage: int, blocks: int, mine: Mapping[str, Tensor], operators: GraphOperators) -> StageModule:
        own: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
        shared: dict[str, Tensor] = {}
        for name in mine:
            here = {block for home, block in self._homes[name] if home == stage}
            if len(here) == 1:
                own[here.pop()][name] = mine[name]
            elif here:
                shared[name] = mine[name]
        last = stage == self._strategy.pp * self._strategy.stages_per_worker - 1
        module = StageModule(
            own,
            shared,
            operators,
            recomputed=recomputed_blocks(self._strategy, blocks, last=last),
            products=self._strategy.saves_products,
            copies=self._copies,
        )
        for holder in (*module.blocks, module):
            for name, attribute in holder.attributes.items():
                self._owners[name] = (holder, attribute)
        return module

    def _tensor(self, name: str) -> Tensor:
        module, attribute = self._owners[name]
        tensor: Tensor = getattr(module, attribute)
        return tensor

    @property
    def slots(self) -> dict[str, tuple[nn.Module, str]]:
        """Return the module and attribute that hold each tensor, by name."""
        return self._owners

    @property
    def tied(self) -> list[str]:
        """Return the names of the trained parameters that stages of several workers use."""
        several = (name for name in self._homes if len(self._workers_of(name)) > 1)
        return [name for name in several if name in self._trained]

    def trained(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """Return the parameters among `names` that this worker holds, by name."""
        return {name: self._tensor(name) for name in self._owners if name in names}  # type: ignore[misc]

    def held(self) -> dict[str, TensorPlacement]:
        """Return the placement of every tensor on this worker, by name."""
        sizes = {name: self._tensor(name).numel() for name in self._owners}
        strategy = self._strategy
        by_all, by_rows = assign_owners(sizes, strategy.replicas), assign_owners(sizes, strategy.dp)
        return {name: self._lay_out(name, by_all[name], by_rows[name]) for name in self._owners}

    def _lay_out(self, name: str, replica: int, row: int) -> TensorPlacement:
        strategy, mesh = self._strategy, self._mesh
        tensor, placement = self._tensor(name), self._placements.get(name)
        cut, layout = isinstance(placement, Sharded), self.unsplit_layout(name)
        workers = self._workers_of(name)
        holders = len(workers) * (1 if cut else strategy.tp)
        writes = workers[0] == mesh.coordinate("pp") and (cut or mesh.coordinate("tp") == 0)
        if is_split(tensor):
            rows = row_layout(tensor).tiles
            start = rows[0].offsets[0] if rows else 0
            layout = layout.rows(start, start + (rows[0].sizes[0] if rows else 0))
            return TensorPlacement(tensor, layout, holders * strategy.dp, writes and row == mesh.coordinate("dp"), cut)
        return TensorPlacement(tensor, layout, holders * strategy.replicas, writes and replica == mesh.replica, cut)

    def unsplit_layout(self, name: str) -> Layout:
        """Return the layout of a tensor that only `tp` splits, see `Engine.unsplit_layout`."""
        shape, placement = tuple(self._shapes[name]), self._placements.get(name)
        if not isinstance(placement, Sharded):
            return Layout.whole(shape)
        return Layout.split(shape, placement.dim, placement.spans, self._mesh.coordinate("tp"), self._strategy.tp)

    def partial_groups(self, name: str, summed: Collection[str]) -> list[dist.ProcessGroup]:
        """Return the groups that sum parts of a gradient: over `tp` if it is in `summed`, over stages if it is tied."""
        group = self._mesh.group("tp")
        tied = self._tied.get(tuple(self._workers_of(name)))
        return [each for each in (group if name in summed else None, tied) if each is not None]

    def _workers_of(self, name: str) -> list[int]:
        """Return the indices of the pipeline workers that hold a tensor, in ascending order."""
        return sorted({stage % self._strategy.pp for stage, _ in self._homes[name]})

    def _read(self, weights: Weights) -> None:
        """Allocate this worker's part of the parameters on the meta device, and read it from the weight files."""
        empty = [name for name in self._owners if self._tensor(name).is_meta]
        for stage in self.stages.values():
            materialize(stage, self._mesh.device, self._mesh.home, self._mesh.allocating)
        for name in empty:
            read_weights(weights, name, self._tensor(name), self._lay_out(name, 0, 0).layout)

    def check(self, work: StepWork) -> None:
        """Raise WorkloadError if a step uses a tensor in a block that does not hold it."""
        for name, homes in _homes([work], dict.fromkeys(self._homes, torch.empty(0))).items():
            if name in _used(work) and not set(homes) <= set(self._homes[name]):
                raise WorkloadError(
                    f"the step uses {name} elsewhere than the first step did: the workers that need it do not hold it; "
                    "use dp, or a model that uses its parameters alike in every step"
                )

    # ---- gradients --------------------------------------------------------------------------------------------------

    def _tied_groups(self) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """Create a group for every set of pipeline workers that share a tensor. Collective over all workers.

        Returns the groups that this worker belongs to, by the indices of their pipeline workers.
        """
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        sets = sorted({tuple(self._workers_of(name)) for name in self._homes})
        for workers in (each for each in sets if len(each) > 1):
            assert self._mesh.grid is not None
            ranks = self._mesh.grid.mesh
            stages = (self._mesh.grid.mesh_dim_names or ()).index("pp")
            columns = ranks.movedim(stages, -1).reshape(-1, ranks.shape[stages])  # one row per pipeline
            for column in columns.tolist():
                members = [column[worker] for worker in workers]
                group = dist.new_group(members)
                if self._mesh.rank in members:
                    groups[workers] = group
        return groups

    def _make_reducers(self) -> dict[int, GradientReducer]:
        """Create one reducer per stage.

        Key -1 is for tensors that several stages of this worker use, complete only at the end.

        Returns an empty dict without replicas. With `fully_shard` the reducers cover only what it leaves whole.
        """
        if self._joining is None:
            return {}
        reducers = {}
        for key, stages in {**{stage: [stage] for stage in self.stages}, -1: []}.items():
            names = self._twice if key == -1 else [n for n in self._on(stages) if n not in self._twice]
            if self.sharded:
                names = [name for name in names if name in self._whole]
            tensors = {name: self._tensor(name) for name in names}
            parameters = {n: p for n, p in tensors.items() if isinstance(p, nn.Parameter) and p.requires_grad}
            if parameters:
                reducers[key] = GradientReducer(parameters, self._joining.whole, self._strategy.bucket)
        return reducers

    def before_backward(self, stage: int, final: bool) -> None:
        """Prepare a backward pass of a stage. `final` marks the stage's last backward of its pass."""
        self._copies.adds = not final or stage not in self._reducers
        if self.sharded:
            module: Any = self.stages[stage]  # `fully_shard` adds these methods
            splits = final or self._strategy.reduces_at_once
            module.set_requires_gradient_sync(splits)
            module.set_is_last_backward(splits)
            module.set_reshard_after_backward(splits)
        if final and stage in self._reducers and not self.sharded:
            self._reducers[stage].arm()

    def after_evaluation(self) -> None:
        """Free gathered parameters, see `fsdp.reshard`."""
        if self.sharded:
            from shardwise.parallel.data.fsdp import reshard

            for stage in self.stages.values():
                reshard(stage)

    def reduce(self, summed: Collection[str]) -> None:
        """Sum gradients over all workers that contribute to them. Collective."""
        self._copies.adds = False
        for _, reducer in sorted(self._reducers.items(), reverse=True):  # in the order of the backward pass
            reducer.finish()
        if self.sharded:
            for name in self._whole:  # summed by the reducers, but fully_shard averages
                gradient = self._tensor(name).grad
                if gradient is not None:
                    gradient /= self._strategy.replicas
        group = self._mesh.group("tp")
        if group is not None:
            self._sum([name for name in self._owners if name in summed], group)
        for workers, tied in self._tied.items():
            names = [n for n in self._homes if n in self._owners and tuple(self._workers_of(n)) == workers]
            self._sum(self._complete(names, tied), tied)

    def _complete(self, names: Sequence[str], group: dist.ProcessGroup) -> list[str]:
        """Return the names of parameters that have a gradient on any worker of `group`.

        A missing one here is set to zeros.

        A stage may use a tied parameter in a way that no gradient flows back through.
        """
        trained = [name for name in names if self._tensor(name).requires_grad]
        if group not in self._given:  # equal in every step
            here = [self._tensor(name).grad is not None for name in trained]
            found = anywhere(here, group, self._mesh.device)
            self._given[group] = [name for name, given in zip(trained, found, strict=True) if given]
        for name in self._given[group]:
            tensor = self._tensor(name)
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return self._given[group]

    def _sum(self, names: Iterable[str], group: dist.ProcessGroup) -> None:
        parameters = [self._tensor(name) for name in names]
        gradients = [local(p.grad) for p in parameters if p.requires_grad and p.grad is not None]
        if gradients:
            sum_gradients(gradients, group)


def _homes(works: Sequence[StepWork], tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[int, int]]]:
    """Return (stage, block) of every use of each tensor. A tensor that no work uses is put into the first block."""
    homes: dict[str, set[tuple[int, int]]] = {name: set() for name in tensors}
    for work in works:
        for stage, each in enumerate(work.stages):
            for block, piece in enumerate(each.blocks):
                for name in piece.section.tensors:
                    homes[name].add((stage, block))
    return {name: sorted(found) or [(0, 0)] for name, found in homes.items()}


def _used(work: StepWork) -> set[str]:
    pieces = (piece for stage in work.stages for piece in stage.blocks)
    return {name for piece in pieces for name in piece.section.tensors}


def _cut(tensor: Tensor, placement: Placement | None, exchange: Exchange) -> Tensor:
    """Return this worker's part of a parameter or buffer, in memory of its own."""
    part = tensor.detach()
    if isinstance(placement, Sharded):
        part = exchange.cut(part, placement.dim, placement.spans)
    part = part.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
