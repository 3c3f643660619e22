"""The trace is what Chrome's Trace Event Format asks for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from shardwise.reports.perfetto import chrome_trace


def row(process: str, stream: str, start: float, seconds: float, **notes: Any) -> dict[str, Any]:
    return {
        "process": process,
        "stream": stream,
        "name": f"{stream} at {start}",
        "kind": "forward",
        "start_seconds": start,
        "seconds": seconds,
        **notes,
    }


ROWS = [
    row("rank 0", "compute", 0.0, 1e-3, rank=0, microbatch=2),
    row("rank 0", "pp to 11", 1e-3, 5e-4, rank=0),
    row("rank 0", "pp to 2", 1e-3, 5e-4, rank=0),
    row("rank 8", "compute", 2e-3, 1e-3, rank=8),
]


def test_events() -> None:
    document = chrome_trace({"dp=2": ROWS})
    assert document["displayTimeUnit"] == "ms"
    complete = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in complete] == [each["name"] for each in ROWS]
    assert (complete[0]["ts"], complete[0]["dur"]) == (0.0, 1000.0)  # microseconds
    assert complete[0]["args"] == {"rank": 0, "microbatch": 2}
    assert complete[0]["cat"] == "forward"
    for event in document["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= set(event)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)


def test_names_of_processes_and_threads() -> None:
    events = chrome_trace({"dp=2": ROWS})["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "rank 0", 1: "rank 8"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert [threads[key] for key in sorted(threads) if key[0] == 0] == ["compute", "pp to 2", "pp to 11"]
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    assert used == set(threads)


def test_several_steps_have_processes_of_their_own() -> None:
    events = chrome_trace({"dp=2": ROWS, "tp=2": ROWS[:1]})["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "dp=2: rank 0", 1: "dp=2: rank 8", 2: "tp=2: rank 0"}


def test_events_of_a_thread_do_not_overlap() -> None:
    from shardwise.cluster.find import find_cluster
    from shardwise.predict.profile.profiler import Profiles
    from shardwise.predict.simulate import played
    from shardwise.strategy import Strategy
    from shardwise.workload.load import load_workload

    workload = load_workload("gpt:layers=4,hidden=64,heads=4,sequence=16,vocabulary=256,batch_size=16")
    strategy = Strategy.parse("fsdp=2,tp=2,pp=2,microbatches=4,schedule=interleaved")
    step = played(Profiles(workload), strategy, find_cluster("a100x8"), {})
    events = [e for e in chrome_trace({"step": step.document()})["traceEvents"] if e["ph"] == "X"]
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(lanes) > 6
    for times in lanes.values():
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(sorted(times)))
