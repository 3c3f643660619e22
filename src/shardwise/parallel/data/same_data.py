"""Find workers that were given other data than the rest, before they train on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.errors import DataError
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.gather import gather_json
from shardwise.workload.data import is_map_style
from shardwise.workload.workload import Workload


def check_same_data(workload: Workload, mesh: Mesh) -> None:
    """Raise DataError if datasets, batch size or seed differ between workers. Collective."""
    if mesh.world is None:
        return
    evaluation = workload.evaluation
    mine = {
        "the dataset": _described(workload.dataset),
        "the held-out dataset": "nothing" if evaluation is None else _described(evaluation.dataset),
        "the batch": f"batch_size={workload.batch_size}",
        "the order of the data": f"seed={workload.seed}",
    }
    everybody = gather_json(mine, mesh.world, mesh.device)
    for what in mine:
        if any(each[what] != mine[what] for each in everybody):
            found = by_rank([each[what] for each in everybody])
            raise DataError(f"{what} of workload {workload.name!r} has {found}: it must be the same on every worker")


def _described(dataset: Any) -> str:
    """Describe a dataset as far as possible without reading it."""
    kind = "samples" if is_map_style(dataset) else "samples in a stream"
    return f"{len(dataset)} {kind}" if hasattr(dataset, "__len__") else "a stream of unknown length"


def by_rank(values: Sequence[str]) -> str:
    """Join the ranks' values, grouping equal ones: `64 samples on ranks 0 and 2, 40 samples on rank 1`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {_ranks(those)}" for value, those in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Name the ranks by number; more than eight are abbreviated, because a job may have thousands."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:4]))}, ...)"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
