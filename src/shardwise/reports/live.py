"""Text of a run's state: a frame for a terminal, and single lines for a file. States are documents of `api.watch`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.reports.sparkline import ASCII, BLOCKS, heat, heat_level, progress_bar, sparkline
from shardwise.reports.terminal import Segment, Terminal
from shardwise.reports.text import _metric, _number
from shardwise.units import format_bytes, format_rate, format_seconds, format_share

BAR, CURVE, HEAT = 24, 40, 64
"""Widths in characters of the bar of progress, the curve of the loss, and the line of ranks."""

WARM, HOT = 1.1, 1.3
"""Ratios of a rank's time to the median from which on its colour changes."""

SHOWN_WARNINGS = 3

STALLED_SECONDS, STALLED_STEPS = 10.0, 10
"""Pause after which a frame says for how long there was no step: so many seconds, and so many step times."""

_COLOURS = {"running": "good", "finished": "good", "failed": "bad", "killed": "bad"}


def frame(state: Mapping[str, Any], terminal: Terminal) -> list[str]:
    """Return the lines that show a state."""
    rows = {
        "step": _progress(state, terminal),
        "loss": _loss(state, terminal),
        "held out": _plain(_evaluation(state)),
        "speed": _plain(_speed(state)),
        "ranks": _ranks(state, terminal),
        "memory": _plain(_memory(state)),
        "saved": _plain(_saved(state)),
    }
    shown = {name: segments for name, segments in rows.items() if segments}
    width = max(map(len, shown))
    lines: list[list[Segment]] = [
        [(title(state), "bold"), ("  ", ""), (state["state"], _COLOURS.get(state["state"], "middle"))],
        *([(f"  {name.ljust(width)}  ", "faint"), *segments] for name, segments in shown.items()),
        *([("  warning: ", "middle"), (each["text"], "")] for each in state["warnings"][-SHOWN_WARNINGS:]),
        *([[(f"  {outcome(state)}", _COLOURS.get(state["state"], ""))]] if outcome(state) else []),
    ]
    return [terminal.line(line) for line in lines]


def news(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return what is new in a state, in single lines. `before` is the state that was shown last; None: none was."""
    lines = [] if before is not None else [title(now)]
    known = before or {"step": 0, "evaluation": None, "checkpoint": None, "warnings": []}
    if now["step"] != known["step"]:
        parts = [f"loss {_number(now['loss'])}", *filter(None, [_speed(now), _left(now)])]
        lines.append(f"step {_step(now)}: {', '.join(parts)}")
    if now["evaluation"] and now["evaluation"] != known["evaluation"]:
        lines.append(f"held out: {_evaluation(now)}")
    step = now["checkpoint"] and now["checkpoint"]["step"]
    if step is not None and step != (known["checkpoint"] and known["checkpoint"]["step"]):
        lines.append(f"checkpoint of step {step}")
    lines += [f"warning: {each['text']}" for each in now["warnings"] if each not in known["warnings"]]
    return [*lines, *filter(None, [outcome(now)])]


def title(state: Mapping[str, Any]) -> str:
    """Say what is trained and how."""
    count = state["workers"]
    workers = "" if count is None else f" on {count} worker" + ("" if count == 1 else "s")
    return f"{state['workload']} under {state['strategy']}{workers}"


def outcome(state: Mapping[str, Any]) -> str:
    """Say how a run ended, or why that is not known; empty while it goes on."""
    step, text = state["step"], state["text"]
    goes_on = (
        "--resume begins anew"
        if state["checkpoint"] is None
        else (f"--resume goes on from step {state['checkpoint']['step']}")
    )
    said = {
        "finished": f"finished after {step} step" + ("" if step == 1 else "s"),
        "stopped": f"told to end after step {step}; {goes_on}",
        "interrupted": f"interrupted after step {step}; {goes_on}",
        "failed": f"failed after step {step}: {text}; {goes_on}",
        "killed": f"ended without a word after step {step}: killed, or its machine went down; {goes_on}",
        "unknown": "the file system has no locks: whether a process still trains cannot be told",
    }
    return said.get(state["state"], "")


def _plain(text: str) -> list[Segment]:
    return [(text, "")] if text else []


def _step(state: Mapping[str, Any]) -> str:
    total = state["total_steps"]
    return f"{state['step']:,}" if total is None else f"{state['step']:,} of {total:,}"


def _left(state: Mapping[str, Any]) -> str:
    return "" if state["seconds_left"] is None else f"{format_seconds(state['seconds_left'])} left"


def _progress(state: Mapping[str, Any], terminal: Terminal) -> list[Segment]:
    total, parts = state["total_steps"], [_step(state)]
    if total:
        share = state["step"] / total
        parts += [progress_bar(share, BAR, blocks=terminal.blocks), format_share(min(share, 1.0))]
    if state["epochs"] is not None and state["epoch"] is not None:
        parts.append(f"epoch {min(state['epoch'] + 1, state['epochs'])} of {state['epochs']}")
    paused = state["seconds_since_step"]
    if state["state"] == "starting":
        parts.append("starting")
    elif paused is not None and paused > max(STALLED_SECONDS, STALLED_STEPS * (state["step_seconds"] or 0.0)):
        return [("  ".join(parts), ""), (f"  no step for {format_seconds(paused)}", "middle")]
    return _plain("  ".join(filter(None, [*parts, _left(state)])))


def _loss(state: Mapping[str, Any], terminal: Terminal) -> list[Segment]:
    curve = sparkline(state["losses"], CURVE, BLOCKS if terminal.blocks else ASCII)
    segments = _plain("  ".join(filter(None, [_number(state["loss"]), curve])))
    if state["first_not_finite_step"] is not None:
        segments.append((f"  not finite at step {state['first_not_finite_step']}", "bad"))
    return segments if state["step"] else []


def _evaluation(state: Mapping[str, Any]) -> str:
    if state["evaluation"] is None:
        return ""
    values = ", ".join(f"{name} {_metric(name, value)}" for name, value in state["evaluation"]["values"].items())
    return f"{values} after step {state['evaluation']['step']:,}"


def _speed(state: Mapping[str, Any]) -> str:
    if state["step_seconds"] is None:
        return ""
    said = f"{format_rate(state['samples_per_second'])} samples/s, {format_seconds(state['step_seconds'])} per step"
    if state["predicted_seconds"] is None:
        return said
    return f"{said}, predicted {format_seconds(state['predicted_seconds'])} ({state['error']:+.0%})"


def _ranks(state: Mapping[str, Any], terminal: Terminal) -> list[Segment]:
    """Return a cell for each rank by its busy time, and words about the slowest."""
    times = state["busy_seconds"]
    if not times or len(times) < 2:
        return []
    cells = heat(times, HEAT)
    levels = BLOCKS if terminal.blocks else ASCII
    segments: list[Segment] = [(heat_level(ratio, levels), _warmth(ratio)) for ratio in cells]
    slowest = max(range(len(times)), key=times.__getitem__)
    ratio = max(cells)
    said = f"  busy {format_seconds(min(times))} to {format_seconds(max(times))}"
    if ratio >= WARM:
        said += f", rank {slowest} takes {ratio:.2f} times the median"
    if len(cells) < len(times):
        said += f" (a cell: the slowest of {-(-len(times) // HEAT)} ranks)"
    return [*segments, (said, "")]


def _warmth(ratio: float) -> str:
    return "bad" if ratio >= HOT else "middle" if ratio >= WARM else "good"


def _memory(state: Mapping[str, Any]) -> str:
    """Return the peak memory of the worker that needs most, or of rank 0 if the others are not known."""
    predicted = state["predicted_memory_bytes"]
    if state["memory_bytes"] is None:
        return "" if predicted is None else f"{format_bytes(predicted)} per worker predicted"
    alone = state["memory_bytes_by_worker"] is None and state["workers"] not in (None, 1)
    said = f"{format_bytes(state['memory_bytes'])} {'on rank 0' if alone else 'per worker'}"
    return said if predicted is None else f"{said}, predicted {format_bytes(predicted)}"


def _saved(state: Mapping[str, Any]) -> str:
    if state["checkpoint"] is None:
        return "no checkpoint yet"
    seconds = state["checkpoint"]["seconds_ago"]
    when = "just now" if seconds < 1 else f"{format_seconds(seconds)} ago"
    return f"checkpoint of step {state['checkpoint']['step']:,}, {when}"
