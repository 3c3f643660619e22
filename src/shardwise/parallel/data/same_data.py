"""Find workers that were given other data than the rest, before they train on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.errors import DataError
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.gather import gather_json
from shardwise.workload.data import is_map_style
from shardwise.workload.reading.draws import drawing_from, seed_draws
from shardwise.workload.reading.facts import Difference, difference, facts_of
from shardwise.workload.reading.order import epoch_batches
from shardwise.workload.reading.seen import Named
from shardwise.workload.workload import Workload

PROBED = 4
"""Number of samples that every worker reads before the first step, to compare them."""

REREAD = 2
"""Number of these that are read a second time, to find those that are drawn from a generator of the dataset's own."""

ADVICE = (
    "sort what comes from a set or a folder, and draw with `random`, `numpy.random` or torch's own generator, which "
    "are seeded alike on all workers, or from one that you seed yourself"
)


def check_same_data(workload: Workload, mesh: Mesh) -> None:
    """Raise DataError if datasets, their first samples, batch size or seed differ between workers. Collective."""
    if mesh.world is None:
        return
    mine = {
        "the dataset": _described(workload.dataset),
        "the held-out dataset": " and ".join(_described(each.dataset) for each in workload.evaluations) or "nothing",
        "the batch": f"batch_size={workload.batch_size}",
        "the order of the data": f"seed={workload.seed}",
    }
    everybody = gather_json(mine, mesh.world, mesh.device)
    for what in mine:
        if any(each[what] != mine[what] for each in everybody):
            found = by_rank([each[what] for each in everybody])
            raise DataError(f"{what} of workload {workload.name!r} has {found}: it must be the same on every worker")
    probed = _probed(workload)
    found_by = gather_json(probed, mesh.world, mesh.device)
    if (differing := difference(found_by)) is not None:
        raise DataError(f"{told(differing)}: workload {workload.name!r} must have equal data on all: {ADVICE}")


def _probed(workload: Workload) -> Named:
    """Describe the first samples of the first epoch, and of the held-out data.

    Raises:
        DataError: a sample is another one when it is read again.
    """
    order: Sequence[int] = ()
    if is_map_style(workload.dataset):
        count = len(workload.dataset)
        batches = epoch_batches(count, workload.batch_size, workload.loading, workload.seed, 0)
        order = batches[0] if batches else ()
    found = list(_read(workload, workload.dataset, order[:PROBED], "sample"))
    again = _read(workload, workload.dataset, order[:REREAD], "sample")
    if (differing := difference([found[:REREAD], again])) is not None:
        first, second = differing.values
        raise DataError(
            f"{differing.sample} of workload {workload.name!r} is another one each time it is read{_at(differing)}: "
            f"{first}, then {second}: draw with `random`, `numpy.random` or torch's own generator, which are seeded "
            "for each sample, or from one that you seed by the index of the sample"
        )
    for evaluation in workload.evaluations:
        held_out = evaluation.dataset
        if is_map_style(held_out):
            where = f" of {evaluation.name!r}" if evaluation.name else ""
            found += _read(workload, held_out, range(min(PROBED, len(held_out))), "held-out sample", where)
    return found


def _read(workload: Workload, dataset: Any, indices: Sequence[int], what: str, where: str = "") -> Named:
    """Read samples with the draws of the first batch, and describe them."""
    found = []
    with drawing_from():
        for position, index in enumerate(indices):
            seed_draws(workload.seed, 0, 0, position)
            found.append((f"{what} {index}{where}", facts_of(dataset[index])))
    return found


def told(found: Difference, ranks: Sequence[int] = ()) -> str:
    """Describe a difference between workers; `ranks` are those that were compared, if not all."""
    return f"{found.sample} differs between workers{_at(found)}: {by_rank(found.values, ranks)}"


def _at(found: Difference) -> str:
    return f" at {found.place}" if found.place else ""


def _described(dataset: Any) -> str:
    """Describe a dataset as far as possible without reading it."""
    kind = "samples" if is_map_style(dataset) else "samples in a stream"
    return f"{len(dataset)} {kind}" if hasattr(dataset, "__len__") else "a stream of unknown length"


def by_rank(values: Sequence[str], ranks: Sequence[int] = ()) -> str:
    """Join the ranks' values, grouping equal ones: `64 samples on ranks 0 and 2, 40 samples on rank 1`.

    `ranks` are the ranks of the values, if they are not 0, 1, ...
    """
    grouped: dict[str, list[int]] = {}
    for rank, value in zip(ranks or range(len(values)), values, strict=True):
        grouped.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {_ranks(those)}" for value, those in grouped.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Name the ranks by number; more than eight are abbreviated, because a job may have thousands."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:4]))}, ...)"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
