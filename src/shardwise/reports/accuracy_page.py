"""Markdown page of a validation, with its plots, as `shardwise validate --write` writes it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.reports.scatter import Panel, scatter
from shardwise.units import format_bytes, format_seconds

PANEL_ROWS = 10
"""Least number of rows for a group to get a panel of its own."""

SMALL = 0.005
"""Share of a step below which a term is not listed."""

GIB = 2**30


def accuracy_files(document: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the page and its plots as a map from file name to content.

    Args:
        document: document of `shardwise validate`.
        name: file name of the page; the plots are named after its stem, `STEM-times.svg` and so on.
    """
    stem = name.rsplit(".", 1)[0] or "accuracy"
    times, memory = _times(document), _memory(document)
    plots = {
        f"{stem}-times.svg": scatter([Panel("Step time of all rows", times)], label=_seconds, side=520),
        f"{stem}-groups.svg": _groups_plot(times),
        f"{stem}-memory.svg": _memory_plot(memory),
    }
    plots = {file: plot for file, plot in plots.items() if plot}
    return {name: _page(document, list(plots)), **plots}


def _times(document: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in document["predictions"]:
        series.setdefault(_name(row["group"]), []).append((row["measured_seconds"], row["predicted_seconds"]))
    return series


def _memory(document: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in document["predictions"]:
        measured, predicted = row["measured_memory_bytes"], row["predicted_memory_bytes"]
        if measured and predicted:
            series.setdefault(_name(row["group"]), []).append((measured / GIB, predicted / GIB))
    return series


def _groups_plot(times: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    panels = [Panel(name, {name: points}) for name, points in times.items() if len(points) >= PANEL_ROWS]
    return scatter(panels, label=_seconds, columns=3, side=240) if panels else ""


def _memory_plot(memory: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    panel = Panel("Peak memory of a GPU, GiB", memory)
    return scatter([panel], label=lambda value: f"{value:g}", side=420) if memory else ""


def _name(group: str) -> str:
    return group or "(no group)"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _page(document: Mapping[str, Any], plots: Sequence[str]) -> str:
    parts = [
        _introduction(document),
        _groups(document),
        *(f"![predicted against measured]({file})" for file in plots),
        _worst(document),
        _repeats(document),
        _held_out(document),
        _constants(document),
        _skipped(document),
        _assumed(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(document: Mapping[str, Any]) -> str:
    text = (
        "Written by `shardwise validate RUNS.csv --write PAGE.md`, never by hand. This page compares predictions with "
        f"{document['rows']:,} training runs of {len(document['groups'])} groups that others measured. A row becomes "
        "the sizes of a model, a strategy, and a value that says what the row's software does (`predict/runtime`). The "
        "rest is the predictor of `simulate`, `plan` and `train`. What Shardwise itself would take for such runs is on "
        "a [page of its own](standing.md). Errors are absolute and relative to the measurement. Over all rows, the "
        "mean is "
        f"{_share(document['mean_error'])}, the median {_share(document['median_error'])} and the 90th percentile "
        f"{_share(document['p90_error'])}. The mean of the groups' mean errors is {_share(document['mean_of_groups'])}."
    )
    return f"# Accuracy of the predictions\n\n{_wrapped(text)}"


def _groups(document: Mapping[str, Any]) -> str:
    header = "| group | rows | mean | median | 90th percentile | bias | rank correlation | rank of best | memory |"
    lines = ["## By group", "", header, "| --- |" + " ---: |" * 8]
    for name, group in document["groups"].items():
        correlation = group["rank_correlation"]
        cells = [
            _name(name),
            str(group["rows"]),
            *(_share(group[key]) for key in ("mean_error", "median_error", "p90_error")),
            f"{group['bias']:+.1%}",
            "" if correlation is None else f"{correlation:.3f}",
            "" if correlation is None else f"{group['best_is_predicted']}.",
            f"{_share(group['memory_mean_error'])} of {group['memory_rows']}" if group["memory_rows"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        "`bias` is the median of the errors with their sign; a positive one means that the prediction is too slow. "
        "`rank correlation` is Spearman's, between predicted and measured step times. `rank of best` is the rank that "
        "the fastest measured run has among the predictions. Both are given for groups of ten rows or more. `memory` "
        "is the mean error of peak memory over the rows that state it. Memory is counted as the source counts it: "
        "tensors allocated, reserved by the allocator, or what the device shows."
    )
    lines += ["", _wrapped(text)]
    return "\n".join(lines)


def _worst(document: Mapping[str, Any]) -> str:
    lines = [
        "## The worst row of each group, term by term",
        "",
        "| group | line | run | measured | predicted | error | predicted terms |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    worst: dict[str, Mapping[str, Any]] = {}
    for row in document["predictions"]:
        other = worst.get(row["group"])
        if other is None or abs(row["error"]) > abs(other["error"]):
            worst[row["group"]] = row
    for group, row in worst.items():
        terms = ", ".join(
            f"{name} {format_seconds(value)}"
            for name, value in row["terms"].items()
            if value > SMALL * row["predicted_seconds"]
        )
        seconds = [format_seconds(row[key]) for key in ("measured_seconds", "predicted_seconds")]
        cells = [_name(group), str(row["line"]), row["run"], *seconds, f"{row['error']:+.0%}", terms]
        lines.append(f"| {' | '.join(cells)} |")
    memory = [row for row in document["predictions"] if row["memory_error"] is not None]
    if memory:
        lines += ["", *_worst_memory(memory)]
    return "\n".join(lines)


def _worst_memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    worst: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        other = worst.get(row["group"])
        if other is None or abs(row["memory_error"]) > abs(other["memory_error"]):
            worst[row["group"]] = row
    lines = [
        "The worst prediction of peak memory in each group:",
        "",
        "| group | line | run | measured | predicted | error | predicted terms |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for group, row in worst.items():
        terms = ", ".join(f"{name} {format_bytes(value)}" for name, value in row["memory_terms"].items() if value > 0)
        sizes = [format_bytes(row[key]) for key in ("measured_memory_bytes", "predicted_memory_bytes")]
        cells = [_name(group), str(row["line"]), row["run"], *sizes, f"{row['memory_error']:+.0%}", terms]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _repeats(document: Mapping[str, Any]) -> str:
    found = {name: group for name, group in document["groups"].items() if group["repeated_rows"]}
    if not found:
        return ""
    lines = [
        "## Scatter of the measurements themselves",
        "",
        _wrapped(
            "Some rows of a group are equal in model, software, strategy and machine: one configuration, measured "
            "several times. The table shows how far these rows are from their mean. It also shows the rank correlation "
            "to expect of a perfect predictor if all rows of the group scatter like these. No predictor that reads "
            "only the rows can do better."
        ),
        "",
        "| group | rows measured again | mean deviation | largest | rank correlation of a perfect predictor |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, group in found.items():
        deviation = _share(group["repeat_mean_deviation"])
        largest = _share(group["repeat_largest_deviation"])
        perfect = group["repeat_rank_correlation"]
        ranked = "" if perfect is None else f"{perfect:.3f}"
        lines.append(f"| {_name(name)} | {group['repeated_rows']} | {deviation} | {largest} | {ranked} |")
    return "\n".join(lines)


UNSEEN = (
    "A group is badly predicted unseen if the others do not show what it depends on. The runs of Sailor alone compute "
    "in tf32, and their source leaves the precision open: they are slower than tf32 and faster than float32 is "
    "predicted, so that neither a datasheet nor another group tells their rate. Mostly vTrain's single node and Sailor "
    "wait for their hosts; each is predicted with the host time that the other shows, twice the start. Blackwell and "
    "Blackwell Ultra are predicted from each other by their watts; the measured difference is larger."
)
"""Why groups of the table of `_held_out` are predicted worse when they are left out."""


def _held_out(document: Mapping[str, Any]) -> str:
    """Format the errors of groups that were left out of the fit, beside their fitted errors; empty without any."""
    left = document["fit"].get("held_out", {})
    found = [(name, group) for name, group in document["groups"].items() if name in left]
    if not found:
        return ""
    lines = [
        "## Errors on groups that were left out of the fit",
        "",
        _wrapped(
            "The constants are fitted once to all rows together. For this table they were fitted again for each group, "
            "without its rows, starting from values that one would use without a fit. These are the errors to expect "
            "for runs that nobody has seen."
        ),
        "",
        _wrapped(UNSEEN),
        "",
        "| group | mean error | when left out of the fit |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {_name(name)} | {_share(group['mean_error'])} | {_share(left[name])} |" for name, group in found]
    means = [sum(values) / len(values) for values in ([g["mean_error"] for _, g in found], [left[n] for n, _ in found])]
    return "\n".join([*lines, f"| mean | {_share(means[0])} | {_share(means[1])} |"])


def _constants(document: Mapping[str, Any]) -> str:
    lines = [
        "## The constants",
        "",
        _wrapped(
            "No datasheet has these constants. `python -m benchmarks.fit` fits them to all sources together, never by "
            "row or by source. `shardwise.predict.hardware.constants.Constants` explains each; times are in seconds. "
            "The last two columns say by how many percentage points the mean error over groups rises if the constant "
            "is a tenth smaller or larger. If both are near 0, the rows do not determine the constant."
        ),
        "",
        "| constant | value | before the fit | origin | source | a tenth smaller | a tenth larger |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for name, entry in document["constants"].items():
        rises = [f"{100 * entry[key]:+.2f}" if key in entry else "" for key in ("rise_below", "rise_above")]
        start = f"{entry['start']:.4g}" if "start" in entry else ""
        cells = [f"`{name}`", f"{entry['value']:.4g}", start, entry["origin"], entry["source"], *rises]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _skipped(document: Mapping[str, Any]) -> str:
    if not document["skipped_rows"]:
        return "## Skipped rows\n\nNone."
    lines = ["## Skipped rows", "", "| line | group | reason |", "| ---: | --- | --- |"]
    lines += [f"| {row['line']} | {_name(row['group'])} | {row['reason']} |" for row in document["skipped_rows"]]
    return "\n".join(lines)


def _assumed(document: Mapping[str, Any]) -> str:
    """Format the values that were assumed where rows leave something open, by group; empty if there are none."""
    counts: dict[tuple[str, str], int] = {}
    for row in document["predictions"]:
        for entry in row["assumed"]:
            counts[row["group"], entry] = counts.get((row["group"], entry), 0) + 1
    if not counts:
        return ""
    lines = ["## Values that rows leave open", "", "| group | assumed | rows |", "| --- | --- | ---: |"]
    lines += [f"| {_name(group)} | {entry} | {count} |" for (group, entry), count in counts.items()]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
