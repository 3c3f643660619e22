"""Every error that Shardwise raises on purpose, and the exit status of each.

ShardwiseError                      exit 1: the work itself failed
├── WorkerFailed                    a worker process died; carries its rank and its own traceback
│   └── WorkerHung                  a worker blocks the others, or all wait for each other; carries its stack
├── NotVerified                     a strategy does not compute the same as one worker
├── NotFinite                       the loss or a gradient of a training is not finite
├── DoesNotFit                      no strategy fits into the memory of the devices
├── PlanBroken                      a plan file does not hold on this cluster
├── NotAccurate                     the error of predictions is above the requested limit
└── RequestError                    exit 2: the request is wrong; found before any worker starts
    ├── StrategyError               unknown axis, wrong degree, impossible for this model
    ├── WorkloadError               cannot be imported, built or traced; unknown parameter
    ├── DataError                   nothing in the folder, samples of the wrong kind
    ├── RunFolderError              the output folder holds another run, or the run does not exist
    ├── CheckpointError             the checkpoint is damaged, truncated or of another model
    ├── NotProved                   the first step of a training is not that of one process
    └── ClusterError                unknown device; a cluster file with a wrong, missing or unknown field
        └── NotMeasured             this machine has not been measured

Each message is one line: the fault, the value, the remedy. `ShardwiseError` makes it one line whatever the value is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

LONGEST_MESSAGE, LONGEST_WORD = 1500, 100
"""Largest number of characters of a message, and of each word in a message that exceeds it."""

LONGEST_GUESS = 80
"""Largest number of characters of a word to compare with the known ones: longer words are slow, and hardly typos."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class ShardwiseError(Exception):
    """Failure of the work itself; base class of all errors that Shardwise raises on purpose."""

    exit_status = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "not enough memory", "can't allocate memory", "SIGKILL")
"""Words in a worker's traceback or error message that mean out of memory: of CUDA, torch's CPU allocator and Linux."""


class WorkerFailed(ShardwiseError):
    """Death of a worker process: `rank` is the worker's, `traceback` is its own (may be empty)."""

    def __init__(self, message: str, *, rank: int, traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback

    @property
    def out_of_memory(self) -> bool:
        """Return whether the worker died because it ran out of memory."""
        told = f"{self}\n{self.traceback}"
        return any(words in told for words in OUT_OF_MEMORY)


class WorkerHung(WorkerFailed):
    """Hang of a worker, which made no progress for too long: `rank` is its rank, `traceback` its stack (or empty)."""


class NotVerified(ShardwiseError):
    """A strategy that does not compute the same as one worker."""


class NotFinite(ShardwiseError):
    """A loss or a gradient that is infinite or not a number; all workers raise this error at the same step."""


class NotAccurate(ShardwiseError):
    """Predictions whose mean error exceeds the requested limit."""


class DoesNotFit(ShardwiseError):
    """No strategy fits into the memory of the devices; the message says by how much, and how many devices suffice."""


class PlanBroken(ShardwiseError):
    """A plan file that no longer holds on this cluster."""


class RequestError(ShardwiseError):
    """A wrong request; the message names the fault, the value and the remedy in one line."""

    exit_status = 2


class StrategyError(RequestError):
    """A strategy that is impossible, in itself or for this model and these workers."""


class WorkloadError(RequestError):
    """A workload that cannot be imported, built or traced."""


class DataError(RequestError):
    """Data that is missing or of the wrong kind."""


class RunFolderError(RequestError):
    """A run folder that already holds another run, or does not exist."""


class CheckpointError(RequestError):
    """A checkpoint that is damaged, truncated, or of another model."""


class NotProved(RequestError):
    """A training whose first step is not that of one process, see `run.verification.first_step`."""


class ClusterError(RequestError):
    """A device or node that is not in the catalogue, or a cluster file with a wrong, missing or unknown field."""


class NotMeasured(ClusterError):
    """This machine has not been measured, and must not be measured now."""


def one_line(text: str) -> str:
    """Return a text as one line that is safe to print: control characters are escaped, long values are shortened."""
    text = " ".join(part.strip() for part in text.splitlines())
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    if len(line) <= LONGEST_MESSAGE:
        return line
    line = " ".join(_shortened(word, LONGEST_WORD) for word in line.split(" "))
    return _shortened(line, LONGEST_MESSAGE)


def _shortened(text: str, most: int) -> str:
    """Cut the middle out of a text of more than `most` characters; the fault at its start and the remedy stay."""
    half = most // 2 - 1
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


@contextmanager
def blamed(said: str, passing: tuple[type[Exception], ...] = (RequestError,)) -> Iterator[None]:
    """Raise WorkloadError for an error of the user's own code inside the block: `said`, its type and its text.

    Errors of the types in `passing` are raised as they are.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise WorkloadError(f"{said}: {type(error).__name__}: {error}") from error


def agreed(option: str, pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, _Value]:
    """Collect the values of an option that may be given several times, by key.

    Raises:
        RequestError: a key has two different values.
    """
    found: dict[_Key, _Value] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise RequestError(
                f"{option} {key}={found[key]} and {option} {key}={value} contradict each other: leave one of them out"
            )
    return found


def nearest(value: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" if a known word is close to `value`, else an empty string."""
    matches = difflib.get_close_matches(value[:LONGEST_GUESS], list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
