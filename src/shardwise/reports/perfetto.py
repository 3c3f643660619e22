"""A simulated step as a trace that Perfetto and chrome://tracing open: a process per rank, a thread per stream.

The format is Chrome's Trace Event Format, its JSON object form: complete events (`ph` X), times in microseconds, and
metadata events (`ph` M) that name processes and threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STREAMS = ("compute", "tp", "fsdp", "dp", "pp", "world")
"""Streams in the order of their threads; messages have one stream for each receiving worker (`pp to 1`)."""

_MICROSECONDS = 1e6
_FIELDS = ("process", "stream", "name", "kind", "start_seconds", "seconds")


def chrome_trace(steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Build the trace of one or several simulated steps.

    Args:
        steps: map from a name, for example the strategy, to rows of `predict.timeline.timeline.Timeline.document`.

    Returns:
        Document to write as JSON.
    """
    events: list[dict[str, Any]] = []
    processes: dict[tuple[str, str], int] = {}
    threads: dict[tuple[int, str], int] = {}
    for step, rows in steps.items():
        for process in dict.fromkeys(row["process"] for row in rows):
            processes[step, process] = len(processes)
            events += _named_process(processes[step, process], f"{step}: {process}" if len(steps) > 1 else process)
        for row in rows:
            process = processes[step, row["process"]]
            if (process, row["stream"]) not in threads:
                threads[process, row["stream"]] = _place(row["stream"])
                events += _named_thread(process, threads[process, row["stream"]], row["stream"])
            events.append(_complete(row, process, threads[process, row["stream"]]))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _place(stream: str) -> int:
    """Return the thread number of a stream, which places streams of one kind next to each other."""
    kind, _, target = stream.partition(" to ")
    place = STREAMS.index(kind) if kind in STREAMS else len(STREAMS)
    return 1000 * place + (int(target) + 1 if target.isdigit() else 0)


def _named_process(process: int, name: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}},
    ]


def _named_thread(process: int, thread: int, name: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}},
        {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}},
    ]


def _complete(row: Mapping[str, Any], process: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": row["name"],
        "cat": row["kind"],
        "pid": process,
        "tid": thread,
        "ts": row["start_seconds"] * _MICROSECONDS,
        "dur": row["seconds"] * _MICROSECONDS,
        "args": {key: value for key, value in row.items() if key not in _FIELDS},
    }
