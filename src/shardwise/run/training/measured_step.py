"""One profiled step of a worker as rows of a timeline, like those of a predicted one (`predict.timeline.timeline`).

    stream          kinds                                rows
    compute         forward, backward, optimizer, other  outermost operations of the thread that trains; GPU: kernels
    waiting         waiting                              the thread that trains waits for other workers; on a CPU
    communication   communication                        collectives and messages in flight

A kernel of a GPU has the kind `compute`: it runs long after the host launched it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd.profiler_util import FunctionEvent

from shardwise.launch.shared_memory.choice import EVENTS
from shardwise.launch.waiting import Interval
from shardwise.parallel.pipeline.executor import WAIT
from shardwise.predict.timeline.rows import Row

MARK = "shardwise::step"
"""Range of the profiler around a step, which relates the profiler's clock to that of the worker."""

_BACKWARD = "autograd::engine::evaluate_function: "
_OPTIMIZER = "Optimizer.step#"
_MESSAGES = ("gloo:", EVENTS, "nccl:")


def step_rows(
    events: Iterable[FunctionEvent], waits: Sequence[Interval], begin: float, device: torch.device
) -> list[Row]:
    """Return the rows of a profiled step: stream, name, kind, start_seconds, seconds; starts count from its begin.

    Args:
        events: the profiler's events, among them one of name `MARK`.
        waits: waits of the step, in seconds of the worker's clock.
        begin: begin of the step on that clock.
        device: device of the worker.
    """
    events = list(events)
    mark = next((event for event in events if event.name == MARK and event.device_type.name == "CPU"), None)
    if mark is None:
        return []
    find = _of_gpu if device.type == "cuda" else _of_cpu
    rows = [
        _row(
            stream,
            name,
            kind,
            (event.time_range.start - mark.time_range.start) * 1e-6,
            (event.time_range.end - event.time_range.start) * 1e-6,
        )
        for event in events
        for stream, name, kind in find(event, mark)
    ]
    rows += [_row("waiting", "wait for other workers", "waiting", start - begin, end - start) for start, end in waits]
    computed = max((_end(row) for row in rows if row["kind"] == "backward"), default=None)
    for row in rows:
        if row["kind"] == "forward" and computed is not None and row["start_seconds"] >= computed:
            row["kind"] = "other"
    return sorted((row for row in rows if row["seconds"] > 0), key=lambda row: row["start_seconds"])


def _row(stream: str, name: str, kind: str, start: float, seconds: float) -> Row:
    return {
        "stream": stream,
        "name": name,
        "kind": kind,
        "start_seconds": round(start, 9),
        "seconds": round(seconds, 9),
    }


def _end(row: Row) -> float:
    return float(row["start_seconds"] + row["seconds"])


def _of_gpu(event: FunctionEvent, mark: FunctionEvent) -> list[tuple[str, str, str]]:
    """Return (stream, name, kind) of a kernel. Returns nothing of other events."""
    if event.device_type.name != "CUDA" or event.is_user_annotation:
        return []
    stream = "communication" if "nccl" in event.name.lower() else "compute"
    return [(stream, event.name, stream)]


def _of_cpu(event: FunctionEvent, mark: FunctionEvent) -> list[tuple[str, str, str]]:
    """Return (stream, name, kind) of an outermost operation, or of a message. Returns nothing of other events."""
    if event.name.startswith(_MESSAGES):
        return [("communication", event.name, "communication")]
    parent = event.cpu_parent
    if event.thread != mark.thread or event is mark or event.name == WAIT or not (parent is None or parent is mark):
        return []
    if event.name.startswith(_BACKWARD):
        return [("compute", event.name.removeprefix(_BACKWARD), "backward")]
    if event.name.startswith(_OPTIMIZER):
        return [("compute", event.name.removeprefix(_OPTIMIZER).removesuffix(".step"), "optimizer")]
    kind = "other" if event.name.startswith("c10d::") else "forward"
    return [("compute", event.name.removeprefix("aten::"), kind)]
