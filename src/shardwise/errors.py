"""Every error that Shardwise raises on purpose, and the exit status of each.

ShardwiseError                      exit 1: the work itself failed
├── WorkerFailed                    a worker process died; carries its rank and its own traceback
│   └── WorkerHung                  a worker holds the others up, or they wait for each other; carries its stack
├── NotVerified                     a verification that does not hold
├── NotFinite                       a training whose loss or gradient is not finite
├── DoesNotFit                      no strategy fits into the memory of the devices
├── PlanBroken                      a plan file that does not hold on this cluster
├── NotAccurate                     predictions that are further off than was asked for
└── RequestError                    exit 2: the request is wrong; found before any worker starts
    ├── StrategyError               unknown axis, wrong degree, cannot work for this model
    ├── WorkloadError               cannot be imported, built or traced; unknown parameter
    ├── DataError                   nothing in the folder, samples of the wrong kind
    ├── RunFolderError              an output folder that holds another run, a run that is not there
    ├── CheckpointError             a checkpoint that is damaged, cut short or of another model
    └── ClusterError                a device nobody knows; a cluster file with a wrong, missing or unknown field
        └── NotMeasured             this machine, of which nothing is known

Messages are one line: what is wrong, the value, what would do. `ShardwiseError` sees to it, whatever the value is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

LONGEST_MESSAGE, LONGEST_WORD = 1500, 100
"""Characters of a message, and of a word in one that is too long."""

LONGEST_GUESS = 80
"""Characters of a word that is compared with the known ones: longer words take long, and are no slips of the hand."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class ShardwiseError(Exception):
    """The work itself failed."""

    exit_status = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class WorkerFailed(ShardwiseError):
    """A worker process died. `rank` says which, `traceback` is its own (may be empty)."""

    def __init__(self, message: str, *, rank: int, traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback


class WorkerHung(WorkerFailed):
    """A worker that did not get on for too long. `rank` says which, `traceback` is its stack (may be empty)."""


class NotVerified(ShardwiseError):
    """A parallel run that does not equal one process."""


class NotFinite(ShardwiseError):
    """A loss or a gradient that is infinite or not a number; all workers raise it at the same step."""


class NotAccurate(ShardwiseError):
    """Predictions that are further off than was asked for."""


class DoesNotFit(ShardwiseError):
    """No strategy fits into the memory of the devices; says by how much, and how many devices would do."""


class PlanBroken(ShardwiseError):
    """A plan file that does not hold on this cluster any more."""


class RequestError(ShardwiseError):
    """The request is wrong: one line says what, the value, and what would do."""

    exit_status = 2


class StrategyError(RequestError):
    """A strategy that cannot be, or cannot work for this model and these workers."""


class WorkloadError(RequestError):
    """A workload that cannot be imported, built or traced."""


class DataError(RequestError):
    """Data that is missing or of the wrong kind."""


class RunFolderError(RequestError):
    """A run folder that is in the way, or is not there."""


class CheckpointError(RequestError):
    """A checkpoint that is damaged, cut short, or of another model."""


class ClusterError(RequestError):
    """A device or node that is not in the catalogue, or a cluster file with a wrong, missing or unknown field."""


class NotMeasured(ClusterError):
    """Nothing is known of this machine, and it is not to be measured now."""


def one_line(text: str) -> str:
    """Make a text one line that a terminal shows as it is: control characters escaped, endless values cut short."""
    text = " ".join(part.strip() for part in text.splitlines())
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    if len(line) <= LONGEST_MESSAGE:
        return line
    line = " ".join(_shortened(word, LONGEST_WORD) for word in line.split(" "))
    return _shortened(line, LONGEST_MESSAGE)


def _shortened(text: str, most: int) -> str:
    """Cut the middle out of a text of more than `most` characters: what is wrong is at its start, the remedy last."""
    half = most // 2 - 1
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def agreed(option: str, pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, _Value]:
    """Values of an option that may be given several times, by their keys.

    Raises:
        RequestError: two of them say different things of one key.
    """
    found: dict[_Key, _Value] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise RequestError(
                f"{option} {key}={found[key]} and {option} {key}={value} contradict each other: leave one of them out"
            )
    return found


def nearest(value: str, known: Iterable[str]) -> str:
    """Gives "; did you mean 'x'?" when a known word is close to `value`, else an empty string."""
    matches = difflib.get_close_matches(value[:LONGEST_GUESS], list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
