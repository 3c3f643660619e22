"""Ranks, sizes and process sets: `init` joins the job of the launcher that started this process.

A process that no launcher started is a job of one rank. Workers that Shardwise itself started have their group already.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from shardwise.compat.horovod import execution
from shardwise.compat.horovod.execution import Members
from shardwise.compat.horovod.negotiation import Negotiator
from shardwise.compat.horovod.requests import HorovodUseError
from shardwise.launch.context import rank_context, under_launcher
from shardwise.launch.join import join_alone, join_launcher


class ProcessSet:
    """Some of the ranks, for collectives among them; made by `add_process_set` or given to `init`.

    Attributes:
        ranks: global ranks, ascending.
        process_set_id: number of the set; 0 is the set of all ranks, None a set that was not added.

    Raises:
        HorovodUseError: a rank is no whole number.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        if isinstance(ranks, str) or not all(isinstance(rank, int) for rank in ranks):
            raise HorovodUseError(f"ProcessSet({ranks!r}): must be a list of ranks, which are whole numbers")
        self.ranks: list[int] = sorted(set(ranks))
        self.process_set_id: int | None = None

    def size(self) -> int:
        """Return the number of ranks of this set."""
        _check_added(self)
        return len(self.ranks)

    def rank(self) -> int:
        """Return the place of this process in the set. Raises HorovodUseError if it is not in it."""
        self.check_included()
        return self.ranks.index(rank())

    def included(self) -> bool:
        """Return whether this process is in the set."""
        _check_added(self)
        return rank() in self.ranks

    def check_included(self) -> None:
        """Raise HorovodUseError if this process is not in the set."""
        if not self.included():
            raise HorovodUseError(f"rank {rank()} is not in the process set of ranks {self.ranks}")

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


@dataclass(slots=True)
class _World:
    """State between `init` and `shutdown`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    negotiators: dict[int, Negotiator] = field(default_factory=dict)
    sets: dict[int, ProcessSet] = field(default_factory=dict)
    next_set: int = 1
    optimizers: int = 0


global_process_set = ProcessSet(())
"""All ranks; its values are known after `init`."""

_world: _World | None = None


def init(
    comm: Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | Literal["dynamic"] | None = None
) -> None:
    """Join the job that this process belongs to; collective. Does nothing if it already has.

    Args:
        comm: must be all ranks, or None: a job of some of the ranks of another one is a process set here.
        process_sets: sets of ranks to add; `dynamic` adds none, as None: sets can always be added later.

    Raises:
        RequestError: the launcher's variables are wrong, or the other workers do not come.
        HorovodUseError: `comm` is not all ranks, or a process set is wrong.
    """
    global _world
    if _world is not None:
        return
    _join()
    count = dist.get_world_size()
    if comm is not None and sorted(comm) != list(range(count)):
        raise HorovodUseError(f"init(comm={list(comm)}): must be all {count} ranks: use process_sets for some of them")
    members = _members(range(count))
    _world = _placed(members)
    global_process_set.ranks, global_process_set.process_set_id = list(members.ranks), 0
    _world.negotiators[0], _world.sets[0] = Negotiator(members), global_process_set
    for process_set in () if process_sets is None or process_sets == "dynamic" else process_sets:
        add_process_set(process_set)


def _join() -> None:
    """Make a default process group, if neither the script nor Shardwise's launcher has made one."""
    if dist.is_initialized():
        return
    if under_launcher():
        join_launcher()
    else:
        join_alone()


def _members(ranks: Sequence[int]) -> Members:
    """Make a process group of some ranks that only the thread of its negotiations will use; all ranks call this."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = dist.new_group(list(ranks), backend=backend)
    place = list(ranks).index(dist.get_rank()) if dist.get_rank() in ranks else -1
    return Members(group, tuple(ranks), place)


def _placed(members: Members) -> _World:
    """Find the place of this process on its host, and that of its host, from what all ranks know of theirs."""
    context = rank_context()
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "local_rank": None if context is None else context.local_rank,
        "local_workers": None if context is None else context.local_workers,
    }
    told = [json.loads(text) for text in execution.exchange(members, json.dumps(own).encode())]
    hosts = [each["host"] for each in told]
    counted = [hosts[:number].count(host) for number, host in enumerate(hosts)]
    local = [
        count if each["local_rank"] is None else int(each["local_rank"])
        for each, count in zip(told, counted, strict=True)
    ]
    rank = members.place
    return _World(
        rank=rank,
        size=members.size,
        local_rank=local[rank],
        local_size=own["local_workers"] or hosts.count(hosts[rank]),
        cross_rank=local[:rank].count(local[rank]),
        cross_size=local.count(local[rank]),
    )


def shutdown() -> None:
    """Wait for the collectives of this rank and end its part; `init` begins a new one. The process group stays."""
    global _world
    if _world is None:
        return
    for negotiator in _world.negotiators.values():
        negotiator.close()
    for process_set in _world.sets.values():
        process_set.process_set_id = None
    _world = None


def is_initialized() -> bool:
    """Return whether `init` was called, and `shutdown` not after it."""
    return _world is not None


def rank() -> int:
    """Return the rank of this process among all."""
    return _present().rank


def size() -> int:
    """Return the number of processes."""
    return _present().size


def local_rank() -> int:
    """Return the rank of this process among those of its host."""
    return _present().local_rank


def local_size() -> int:
    """Return the number of processes of this host."""
    return _present().local_size


def cross_rank() -> int:
    """Return the rank of this process among those of its local rank on all hosts."""
    return _present().cross_rank


def cross_size() -> int:
    """Return the number of hosts that have a process of this local rank."""
    return _present().cross_size


def is_homogeneous() -> bool:
    """Return whether each host has as many processes as this one."""
    world = _present()
    return world.local_size * world.cross_size == world.size


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Add a set of ranks and return it; all ranks call this, also those that are not in it.

    Raises:
        HorovodUseError: a rank does not exist, the set is empty, or it was added before.
    """
    world = _present()
    added = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    wrong = [each for each in added.ranks if not 0 <= each < world.size]
    if wrong or not added.ranks:
        raise HorovodUseError(f"process set of ranks {added.ranks}: must be some of 0 to {world.size - 1}")
    if any(each.ranks == added.ranks for each in world.sets.values()):
        raise HorovodUseError(f"there is a process set of ranks {added.ranks} already: use that one")
    members = _members(added.ranks)
    added.process_set_id, world.next_set = world.next_set, world.next_set + 1
    world.sets[added.process_set_id] = added
    if members.place >= 0:
        world.negotiators[added.process_set_id] = Negotiator(members)
    return added


def remove_process_set(process_set: ProcessSet) -> bool:
    """Remove a set of ranks; all ranks call this. Returns False if it is not there, or is that of all ranks."""
    world = _present()
    number = process_set.process_set_id
    if not number or number not in world.sets:
        return False
    del world.sets[number]
    if (negotiator := world.negotiators.pop(number, None)) is not None:
        negotiator.close()
    process_set.process_set_id = None
    return True


def get_process_set_ids_and_ranks() -> dict[int, list[int]]:
    """Return the ranks of all process sets by their numbers."""
    return {number: list(each.ranks) for number, each in _present().sets.items()}


def negotiator_of(process_set: ProcessSet) -> Negotiator:
    """Return the negotiator of a process set. Raises HorovodUseError if this process is not in it."""
    process_set.check_included()
    assert process_set.process_set_id is not None
    return _present().negotiators[process_set.process_set_id]


def optimizer_number() -> int:
    """Return the number of this distributed optimizer among those made so far, which is the same on all ranks."""
    world = _present()
    world.optimizers += 1
    return world.optimizers


def _check_added(process_set: ProcessSet) -> None:
    _present()
    if process_set.process_set_id is None:
        raise HorovodUseError(f"the process set of ranks {process_set.ranks} was not added: call add_process_set")


def _present() -> _World:
    if _world is None:
        raise HorovodUseError("Horovod has not been initialized: call shardwise.compat.horovod.init() first")
    return _world
