"""Requests for collectives: each rank announces its own to the others, and all check that they agree.

A request travels as JSON. It says all that a rank without the tensors needs to take part: kind, shapes, dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shardwise.errors import RequestError, ShardwiseError

AVERAGE, SUM, ADASUM, MIN, MAX, PRODUCT = "Average", "Sum", "Adasum", "Min", "Max", "Product"

SAME_SHAPES = ("allreduce", "broadcast", "reducescatter")
"""Kinds of collectives in which the tensors of all ranks have the same shapes."""

PIECES = ("allgather", "alltoall")
"""Kinds of collectives in which the first dimension may differ from rank to rank."""


class HorovodInternalError(ShardwiseError, RuntimeError):
    """A collective that failed: the ranks do not agree about it, or one of them is gone."""


class HorovodUseError(RequestError, ValueError):
    """A call that is wrong by itself, found before anything is sent: no `init`, unknown ranks or process sets."""


class HostsUpdatedInterrupt(ShardwiseError, RuntimeError):
    """A change of the workers at which an elastic training starts again from its present state."""


@dataclass(frozen=True, slots=True)
class CollectiveRequest:
    """One collective that a rank asks for; several tensors are a group, which is executed at once.

    Attributes:
        kind: `allreduce`, `allgather`, `broadcast`, `alltoall`, `reducescatter` or `barrier`.
        name: name by which the requests of all ranks find each other.
        shapes: shape of each tensor on this rank.
        dtypes: dtype of each tensor, such as `float32`.
        device: type of the device that holds the tensors.
        op: reduction.
        prescale: factor of the tensors before a reduction.
        postscale: factor of the result of a reduction.
        root: rank that a broadcast comes from.
        splits: rows that go to each rank of an all-to-all.
    """

    kind: str
    name: str
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    device: str = "cpu"
    op: str = ""
    prescale: float = 1.0
    postscale: float = 1.0
    root: int = -1
    splits: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the request as a value that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CollectiveRequest:
        """Read a request of another rank. Raises TypeError or KeyError if it is none."""
        lists = {
            "shapes": tuple(tuple(int(size) for size in shape) for shape in value["shapes"]),
            "dtypes": tuple(str(dtype) for dtype in value["dtypes"]),
            "splits": tuple(int(rows) for rows in value["splits"]),
        }
        return cls(**{**value, **lists})

    @property
    def reduction(self) -> tuple[Any, ...]:
        """Return what two all-reduces must share to be executed in one message."""
        return (self.kind, self.op, self.device, self.prescale, self.postscale, *sorted(set(self.dtypes)))


def disagreement(requests: Mapping[int, CollectiveRequest], ranks: tuple[int, ...]) -> str | None:
    """Return in what the requests of one name differ, or why they are impossible. Returns None if they agree.

    Args:
        requests: rank -> its request; a rank that is missing has joined.
        ranks: all ranks that take part.
    """
    first_rank, first = next(iter(requests.items()))
    for rank, request in requests.items():
        for field, one, other in _compared(first, request):
            if one != other:
                return (
                    f"{first.kind} {first.name!r}: rank {first_rank} has {field} {one}, rank {rank} has {other}: all "
                    "ranks must ask for the same"
                )
    if (missing := sorted(set(ranks) - requests.keys())) and (
        first.kind != "allreduce" or first.op not in (SUM, AVERAGE)
    ):
        said = f"{first.kind} {first.name!r}{f' with op {first.op}' * bool(first.op)}"
        return (
            f"{said} is not possible after ranks {missing} have joined: they have nothing to add, only the all-reduces "
            "Sum and Average go on"
        )
    if first.kind == "broadcast" and first.root not in ranks:
        return f"broadcast {first.name!r}: root rank {first.root} does not take part, the ranks are {list(ranks)}"
    return None


def _compared(one: CollectiveRequest, other: CollectiveRequest) -> list[tuple[str, Any, Any]]:
    """List the values of two requests that must be equal: name of the value, and both values."""
    values: list[tuple[str, Any, Any]] = [
        ("kind", one.kind, other.kind),
        ("dtypes", ", ".join(one.dtypes), ", ".join(other.dtypes)),
        ("device", one.device, other.device),
        ("op", one.op, other.op),
        ("prescale_factor", one.prescale, other.prescale),
        ("postscale_factor", one.postscale, other.postscale),
        ("root rank", one.root, other.root),
    ]
    if one.kind in SAME_SHAPES:
        values.append(("shapes", list(one.shapes), list(other.shapes)))
    if one.kind in PIECES:
        values.append(("shapes after the first dimension", _rows(one), _rows(other)))
    return values


def _rows(request: CollectiveRequest) -> list[tuple[int, ...]]:
    return [shape[1:] for shape in request.shapes]
