"""Parts of a step as one rank spends it, from the rows of its timeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardwise.reports.page.values import Document, number, text

Interval = tuple[float, float]

COMPUTE, WAITING = "compute", "waiting"
"""Names of the stream that computes, and of that in which the computing thread waits for other workers."""


def axis_of(stream: str) -> str:
    """Return the axis whose communication a stream carries: `pp` for `pp to 1`."""
    return stream.partition(" ")[0]


def span(rows: Iterable[Document]) -> Interval:
    """Return begin and end of the rows in seconds; (0, 0) if there are none."""
    ends = [
        (begin, begin + seconds)
        for row in rows
        if (begin := number(row, "start_seconds")) is not None and (seconds := number(row, "seconds")) is not None
    ]
    return (min(begin for begin, _ in ends), max(end for _, end in ends)) if ends else (0.0, 0.0)


def rank_parts(rows: Iterable[Document], whole: Interval) -> dict[str, float]:
    """Return the seconds that one rank spends computing, in its optimizer, in exposed communication, and waiting.

    Communication is exposed where the rank does not compute meanwhile. Time that two axes share is counted for the
    first of them. Where waits were recorded, the rest is the host's, between its operations; else the rest is waiting.
    The parts add up to the length of `whole`.

    Args:
        rows: the rows of a timeline that are of this rank.
        whole: begin and end of the step on all ranks, in seconds.
    """
    kinds: dict[str, list[Interval]] = {}
    for row in rows:
        begin, seconds, stream = number(row, "start_seconds"), number(row, "seconds"), text(row, "stream")
        if begin is None or seconds is None or seconds <= 0:
            continue
        name = axis_of(stream)
        if stream in (COMPUTE, WAITING):
            name = stream if text(row, "kind") != "optimizer" else "optimizer"
        kinds.setdefault(name, []).append((begin, begin + seconds))
    found: dict[str, float] = {}
    covered: list[Interval] = []
    first = (WAITING, COMPUTE, "optimizer")  # the thread that computes also waits, within its operations
    for name in sorted(kinds, key=lambda each: (first.index(each) if each in first else len(first), each)):
        before = length(covered)
        covered = union([*covered, *kinds[name]])
        found[name] = length(covered) - before
    rest = "host" if WAITING in kinds else WAITING
    found[rest] = found.get(rest, 0.0) + max(0.0, whole[1] - whole[0] - length(covered))
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def mean_parts(rows: Sequence[Document]) -> dict[str, float]:
    """Return the parts of a step, averaged over the ranks of a timeline; empty if it has no rows."""
    ranks, whole = by_rank(rows), span(rows)
    total: dict[str, float] = {}
    for own in ranks.values():
        for name, seconds in rank_parts(own, whole).items():
            total[name] = total.get(name, 0.0) + seconds / len(ranks)
    return total


def by_rank(rows: Iterable[Document]) -> dict[int, list[Document]]:
    """Return the rows of a timeline by their rank, in ascending order of the ranks."""
    found: dict[int, list[Document]] = {}
    for row in rows:
        rank = row.get("rank")
        if isinstance(rank, int):
            found.setdefault(rank, []).append(row)
    return dict(sorted(found.items()))


def ranks_of(rows: Iterable[Document]) -> list[int]:
    """Return the ranks that the rows of a timeline are of, in ascending order."""
    return sorted({rank for row in rows if isinstance(rank := row.get("rank"), int)})


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as a sorted list of intervals that do not touch."""
    result: list[Interval] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Return the total length of intervals that do not overlap."""
    return sum(end - begin for begin, end in intervals)


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Return the parts of intervals that no other covers; both are sorted lists of intervals that do not touch."""
    found: list[Interval] = []
    place = 0
    for begin, end in intervals:
        while place < len(others) and others[place][1] <= begin:
            place += 1
        following = place
        while following < len(others) and others[following][0] < end:
            if others[following][0] > begin:
                found.append((begin, others[following][0]))
            begin = max(begin, others[following][1])
            following += 1
        if begin < end:
            found.append((begin, end))
    return found
