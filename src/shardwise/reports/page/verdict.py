"""The verdict, the first thing in the report: what was done, what binds, and what would change it, with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.reports.page.colours import PART_NAMES, PARTS
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.panels.ranks import busy_of
from shardwise.reports.page.panels.what_if import best_of
from shardwise.reports.page.values import Document, mapping, number, objects, text
from shardwise.units import format_bits, format_bytes, format_rate, format_seconds, format_share

FULL = 0.9
"""Share of the usable memory from which on memory is said to bind."""

MATTERS = 0.1
"""Share of a step from which on waiting is said to bind, as in `planner.explain`."""

SEEN = 0.005
"""Share of a step from which on a part is drawn: what would be called 0% is left out."""

GAIN = 1.02
"""Times the throughput from which on a change is worth a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The first card of the report.

    Attributes:
        headline: what was done, in a sentence with its numbers.
        binds: what limits the speed.
        changes: what would change it, each a sentence.
        tiles: (name, value, remark) of the main numbers.
        parts: parts of the step to draw: name, colour, share.
    """

    headline: str
    binds: str = ""
    changes: tuple[str, ...] = ()
    tiles: tuple[tuple[str, str, str], ...] = ()
    parts: tuple[tuple[str, str, float], ...] = ()


def verdict(document: Document, entries: Sequence[Entry]) -> Verdict:
    """Return the verdict of a report."""
    kind = text(document, "kind")
    if kind == "verify":
        return Verdict(headline=_verify_words(document))
    if kind == "validate":
        return Verdict(headline=_validate_words(document), tiles=tuple(_validate_tiles(document)))
    if kind == "calibrate":
        return Verdict(headline=_calibrate_words(document))
    entry = main_entry(document, entries)
    if entry is None:
        return Verdict(headline=f"{text(document, 'title')}: there is nothing to show yet.")
    return Verdict(
        headline=_headline(document, entries, entry),
        binds=_binds(document, entry),
        changes=tuple(_changes(document, entry)),
        tiles=tuple(_tiles(document, entries, entry)),
        parts=tuple(_parts(entry)),
    )


def main_entry(document: Document, entries: Sequence[Entry]) -> Entry | None:
    """Return the entry that the verdict is about: the fastest measured one, else the best predicted one."""
    measured = [entry for entry in entries if entry.measured_seconds and not entry.by_hand]
    if measured:
        return min(measured, key=lambda entry: entry.measured_seconds or 0.0)
    best = [entry for entry in entries if entry.strategy == text(document, "best")]
    predicted = sorted((e for e in entries if e.predicted_seconds), key=lambda e: e.predicted_seconds or 0.0)
    return next(iter([*best, *predicted, *entries]), None)


# ---- the headline ----------------------------------------------------------------------------------------------------


def _headline(document: Document, entries: Sequence[Entry], entry: Entry) -> str:
    title, where = text(document, "title"), _where(document, entry)
    ran = [each for each in entries if each.was_run and not each.by_hand]
    if len(ran) > 1:
        return _compared(title, where, ran, entry)
    if not ran:
        seconds = entry.predicted_seconds
        what = "is predicted to be the best of" if len(entries) > 1 else "of"
        count = f" {len(entries)} strategies" if len(entries) > 1 else ""
        if seconds is None:
            return f"{title} on {where}: nothing could be predicted."
        if count:
            return f"{title} on {where}: {entry.label} {what}{count}, {format_seconds(seconds)} a step."
        return f"{title} on {where} under {entry.label}: a step is predicted to take {format_seconds(seconds)}."
    return _trained(title, where, entry)


def _trained(title: str, where: str, entry: Entry) -> str:
    steps = int(number(entry.summary, "steps") or len(entry.steps))
    rate, seconds = entry.samples_per_second, entry.measured_seconds
    speed = (
        ""
        if rate is None or seconds is None
        else f" at {format_rate(rate)} samples/s, {format_seconds(seconds)} a step"
    )
    done = f"{title} was trained for {steps:,} step{'s' if steps != 1 else ''} on {where} under {entry.label}{speed}."
    if not entry.steps and not entry.ended:
        return f"{title} on {where} under {entry.label}: the run has not completed a step."
    if not entry.ended:
        return f"{done} It is still running, or ended without its summary: what it wrote until then is shown."
    if number(entry.summary, "stopped"):
        return f"{done} A signal ended it early."
    return done


def _compared(title: str, where: str, ran: Sequence[Entry], best: Entry) -> str:
    seconds = best.measured_seconds
    failed = sum(1 for each in ran if each.failure)
    rest = f" {failed} failed." if failed else ""
    if seconds is None:
        return f"{title} on {where}: of {len(ran)} runs, none has a complete step yet.{rest}"
    base = next((e for e in ran if e.workers == 1 and e.measured_seconds and e.strategy.startswith("single")), None)
    against = ""
    if base is not None and base is not best:
        times = (best.samples_per_second or 0.0) / (base.samples_per_second or 1.0)
        against = f", {times:.2g} times the speed of one worker"
    fastest = f"{best.label} was the fastest of {len(ran)} runs, {format_seconds(seconds)} a step{against}"
    return f"{title} on {where}: {fastest}.{rest}"


def _where(document: Document, entry: Entry) -> str:
    name = text(document, "cluster", "name")
    workers = entry.workers
    count = "" if workers is None else f"{workers:,} worker{'s' if workers != 1 else ''}"
    if not name:
        return count or "an unknown machine"
    if name[:1].isdigit():  # a measured machine is named after its workers
        name = f"this machine ({name})"
    return f"{count} of {name}" if count else name


# ---- what binds ------------------------------------------------------------------------------------------------------


def _parts(entry: Entry) -> Iterator[tuple[str, str, float]]:
    parts = entry.parts
    total = sum(parts.values())
    for name in PARTS:
        if total > 0 and parts.get(name, 0.0) >= SEEN * total:
            yield PART_NAMES[name], PARTS[name], parts[name] / total


def _binds(document: Document, entry: Entry) -> str:
    told = [*_slow_rank(entry), *_step_words(document, entry), *_memory_words(entry)]
    return " ".join(told)


def _slow_rank(entry: Entry) -> list[str]:
    busy = busy_of(entry)
    slow = busy.slow_ranks() if busy is not None and busy.ranks > 1 else []
    if not slow:
        return []
    rank, times = slow[0]
    return [f"Rank {rank} binds: it works {times:.2g} times as long as the others, and all wait for it."]


def _step_words(document: Document, entry: Entry) -> list[str]:
    parts = entry.parts
    total = sum(parts.values())
    if total <= 0:
        return []
    word = "measured" if entry.measured_parts else "predicted"
    waits = {name: value for name, value in parts.items() if name not in ("compute", "optimizer")}
    computing = (total - sum(waits.values())) / total
    if not waits or max(waits.values()) < MATTERS * total:
        return [
            f"Computing binds: it fills {format_share(computing)} of a step ({word}); only more or faster devices help."
        ]
    name = max(waits, key=lambda key: waits[key])
    share = format_share(waits[name] / total)
    rest = f"computing fills {format_share(computing)}"
    return [f"What binds beside computing is {_named(document, entry, name)}: {share} of a step ({word}), {rest}."]


def _named(document: Document, entry: Entry, part: str) -> str:
    if part == "bubble":
        return "the bubble of the pipeline, in which stages wait for each other"
    if part == "waiting":
        return "waiting for other workers"
    if part == "host":
        return "the host, which starts kernels too slowly"
    link = _link(document, entry, part)
    over = f" over {link}" if link else ""
    return f"communication of {part}{over}" if part != "communication" else f"communication{over}"


def _link(document: Document, entry: Entry, axis: str) -> str:
    """Return the link that an axis communicates over: the innermost one that spans its group; empty if unknown."""
    strategy = entry.parsed
    links = objects(document, "cluster", "links")
    if strategy is None or not links:
        return ""
    span = strategy.workers
    if axis in strategy.axes:
        span = strategy.stride(axis) * int(getattr(strategy, axis))
    for link in links:
        if (number(link, "devices") or 0.0) >= span:
            speed = number(link, "bytes_per_second")
            return text(link, "name") + (f" ({format_bits(speed)})" if speed else "")
    return ""


def _memory_words(entry: Entry) -> list[str]:
    available = number(entry.candidate, "memory_available_bytes")
    need = max(entry.memory_by_rank, default=None) or number(entry.candidate, "memory_bytes")
    if not available or need is None or need < FULL * available:
        return []
    if need > available:
        return [f"It does not fit: {format_bytes(need)} of the {format_bytes(available)} that a worker may fill."]
    return [
        f"Memory is nearly full: {format_share(need / available)} of the {format_bytes(available)} that a worker may "
        "fill."
    ]


# ---- what would change it --------------------------------------------------------------------------------------------


def _changes(document: Document, entry: Entry) -> Iterator[str]:
    """Yield what the what-if panel says about one change at a time, and the regret of the choice."""
    found = mapping(document, "what_if")
    cells = {_at(cell): cell for cell in objects(found, "cells")}
    here = _at(mapping(found, "here"))
    now = cells.get(here)
    current = None if now is None else best_of(now)
    own = (
        None
        if now is None
        else next((e for e in objects(now, "candidates") if text(e, "strategy") == entry.strategy), None)
    )
    base = own or current
    rate = number(base, "samples_per_second")
    if now is None or base is None or rate is None:
        return
    if current is not None and text(current, "strategy") != text(base, "strategy"):
        times = (number(current, "samples_per_second") or 0.0) / rate
        if times >= GAIN:
            yield f"Another strategy: {text(current, 'strategy')} is predicted {_times(times)} here."
            rate *= times
    for place, told in ((1, _bandwidth), (0, _devices), (2, _batch)):
        yield from _one_change(cells, here, place, rate, told)


def _one_change(cells: dict[Any, Document], here: tuple[Any, ...], place: int, rate: float, told: Any) -> Iterator[str]:
    """Yield the sentence for the stop of one slider that brings most samples per second, if it brings any."""
    found = []
    for at, cell in cells.items():
        fewer = place == 0 and (at[0] or 0) < (here[0] or 0)
        if fewer or at[place] == here[place] or any(at[n] != here[n] for n in range(3) if n != place):
            continue
        best = best_of(cell)
        value = number(best, "samples_per_second")
        if best is not None and value is not None:
            found.append((value / rate, at[place], text(best, "strategy")))
    if not found:
        return
    times, stop, strategy = max(found)
    if times >= GAIN:
        yield f"{told(stop, here[place])}: predicted {_times(times)}, with {strategy}."
    elif place == 1:
        most = max(each[1] for each in found)
        yield f"Faster links would not help: with {most:g} times the bandwidth the speed stays the same."


def _bandwidth(stop: float, here: float) -> str:
    return f"{stop / here:g} times the bandwidth of all links"


def _devices(stop: float, here: float) -> str:
    return f"{stop:g} devices instead of {here:g}"


def _batch(stop: float, here: float) -> str:
    return f"A batch of {stop:g} samples instead of {here:g}"


def _times(times: float) -> str:
    return f"{times:.2f} times the samples/s"


def _at(cell: Document) -> tuple[float | None, ...]:
    return number(cell, "devices"), number(cell, "bandwidth"), number(cell, "batch")


# ---- the tiles -------------------------------------------------------------------------------------------------------


def _tiles(document: Document, entries: Sequence[Entry], entry: Entry) -> Iterator[tuple[str, str, str]]:
    measured, predicted = entry.measured_seconds, entry.predicted_seconds
    if measured is not None:
        remark = f"predicted {format_seconds(predicted)}" if predicted else "not predicted"
        yield "step, measured", format_seconds(measured), remark
    elif predicted is not None:
        low, high = number(entry.candidate, "low_seconds"), number(entry.candidate, "high_seconds")
        remark = "" if low is None or high is None else f"{format_seconds(low)} to {format_seconds(high)} expected"
        yield "step, predicted", format_seconds(predicted), remark
    rate = entry.samples_per_second if entry.was_run else number(entry.candidate, "samples_per_second")
    if rate is not None:
        yield "samples per second", format_rate(rate), "all workers together"
    need = max(entry.memory_by_rank, default=None) or number(entry.candidate, "memory_bytes")
    if need is not None:
        available = number(entry.candidate, "memory_available_bytes")
        yield "memory of a worker", format_bytes(need), f"of {format_bytes(available)}" if available else "peak"
    if entry.first_step:
        equal = entry.first_step.get("proved") is True
        yield "same as one process", "proved" if equal else "not proved", "first step: loss and gradients"
    regret = number(document.get("comparison"), "regret")
    if regret is not None:
        yield (
            "regret of the choice",
            format_share(max(0.0, regret)),
            f"chosen: {text(document, 'comparison', 'chosen')}",
        )
    loss = next((value for step in reversed(entry.steps) if (value := number(step, "loss")) is not None), None)
    if loss is not None and regret is None:
        yield "last loss", f"{loss:.4g}", f"after {len(entry.steps):,} steps"


# ---- other commands --------------------------------------------------------------------------------------------------


def _verify_words(document: Document) -> str:
    results = objects(document.get("verification"), "results")
    failed = [text(each, "strategy") for each in results if each.get("passed") is not True]
    title = text(document, "title")
    if failed:
        return f"{title}: {', '.join(failed)} does not compute the same as one worker."
    names = ", ".join(text(each, "strategy") for each in results)
    return f"{title}: {names} compute{'s' if len(results) == 1 else ''} the same as one worker, up to rounding."


def _validate_words(document: Document) -> str:
    found = mapping(document, "validation")
    return (
        f"Predictions of {number(found, 'rows') or 0:,.0f} published runs are off by "
        f"{format_share(number(found, 'median_error') or 0.0)} in the median, and by "
        f"{format_share(number(found, 'mean_of_groups') or number(found, 'mean_error') or 0.0)} in the mean over "
        "groups."
    )


def _validate_tiles(document: Document) -> Iterator[tuple[str, str, str]]:
    found = mapping(document, "validation")
    for name, words in (
        ("mean_error", "mean error"),
        ("median_error", "median error"),
        ("p90_error", "nine in ten within"),
    ):
        value = number(found, name)
        if value is not None:
            yield words, format_share(value), "of the measured step"


def _calibrate_words(document: Document) -> str:
    found = mapping(document, "calibration")
    return f"This machine is measured; predictions for it rest on {text(found, 'cluster') or 'its cluster file'}."
