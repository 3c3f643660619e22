"""Places of a job's workers: the host and the switch of each, and the order of ranks in which near workers follow.

Strategies, plans and calibrated clusters take neighbouring ranks for near ones: those of one host in a row, and the
hosts of one switch in a row. Launchers may deal ranks out otherwise (`mpirun --map-by node`, `srun -m cyclic`, nodes
listed by name and not by switch). Workers are then numbered anew before they join.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwise.errors import RequestError
from shardwise.launch.context import settle_rank
from shardwise.launch.meeting import meet_seconds
from shardwise.launch.ranks import RankContext


@dataclass(frozen=True, slots=True)
class Location:
    """Where a worker runs: the switch of its host, empty if nobody names it, and the host's name."""

    switch: str
    host: str


def order_of(places: Sequence[Location]) -> list[int]:
    """Return the workers in the order of their new ranks.

    Workers of one host come in a row and hosts of one switch too, each where its first worker was; worker 0 stays.

    Args:
        places: place of each worker, by the launcher's rank.
    """
    switches = [place.switch for place in places]
    firsts = [(switches.index(place.switch), places.index(place)) for place in places]
    return sorted(range(len(places)), key=lambda worker: (firsts[worker], worker))


def take_place(context: RankContext, store: Any) -> RankContext:
    """Return this worker's rank in the order of `order_of`, which from now on is that of this process. Collective.

    Args:
        context: rank as the launcher said it.
        store: store at which all workers of the job meet.

    Raises:
        RequestError: a worker did not come within `meeting.meet_seconds()`.
    """
    if context.one_host:
        return context
    own = Location(context.switch, socket.gethostname())
    store.set(f"place-{context.rank}", json.dumps([own.switch, own.host]))
    try:
        texts = store.multi_get([f"place-{rank}" for rank in range(context.workers)])
    except RuntimeError as error:  # DistStoreError
        raise RequestError(
            f"rank {context.rank} of {context.workers} ({context.engine}): not all workers came within "
            f"{meet_seconds():g} s: start all of them"
        ) from error
    order = order_of([Location(*json.loads(text)) for text in texts])
    if order == sorted(order):
        return context
    if context.rank == 0:
        sys.stderr.write("shardwise: ranks are numbered anew, so that neighbours are on one host and one switch\n")
    found = replace(context, rank=order.index(context.rank))
    settle_rank(found)
    return found
