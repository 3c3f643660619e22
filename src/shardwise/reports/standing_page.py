"""Markdown page of what Shardwise would take for published runs, as `shardwise validate --standing` writes it."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.units import format_bytes, format_seconds

TEXT = (
    "Written by `shardwise validate RUNS.csv --standing PAGE.md`, never by hand. A few runs of each group that others "
    "published ([accuracy](accuracy.md)) are predicted twice: for the software that ran them, and for Shardwise on the "
    "same machine with the same strategy. Both predictions are of one model of cost; they differ in what the software "
    "does: its kernels, what it overlaps, and how it stores parameters. A ratio above 1 means that Shardwise would "
    "take longer."
)

NARROW = ("fp8", "fp4")
"""Precisions of products that Shardwise does not compute in."""

LIMITS = (
    "Shardwise runs the recipe `gpt` here: root mean square norms, rotary positions, a gated perceptron with as many "
    "parameters as that of the run, and no dropout. It computes in bf16 where the run did so in fp16, fp8 or fp4, and "
    "in float32 where the run did so in tf32. Its parts are compiled, as plans for GPUs have them. Without a pipeline "
    "`zero=1` of other software stands beside `zero=2`: both split the float32 parameters."
)


def standing_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        rows: `standing` of the document of `shardwise validate`.
    """
    parts = ["# Shardwise beside other software", _wrapped(TEXT), _by_runtime(rows), _wrapped(LIMITS), _runs(rows)]
    return "\n\n".join(parts) + "\n"


def _by_runtime(rows: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["ratio"]:
            narrow = f" in {row['computes']}" if row["computes"] in NARROW else ""
            groups.setdefault(row["runtime"] + narrow, []).append(row)
    lines = [
        "| software | runs | time, geometric mean | least | largest | memory, geometric mean |",
        "| --- |" + " ---: |" * 5,
    ]
    for name, found in groups.items():
        ratios = [row["ratio"] for row in found]
        memory = [row["shardwise_memory_bytes"] / row["predicted_memory_bytes"] for row in found]
        shown = (statistics.geometric_mean(ratios), min(ratios), max(ratios), statistics.geometric_mean(memory))
        lines.append(f"| {' | '.join([name, str(len(found)), *(f'{each:.2f}' for each in shown)])} |")
    return "\n".join(lines)


def _runs(rows: Sequence[Mapping[str, Any]]) -> str:
    header = "| group | line | run | strategy | measured | predicted | Shardwise | ratio | memory | of Shardwise |"
    lines = ["## The runs", "", header, "| --- | ---: | --- | --- |" + " ---: |" * 6]
    for row in rows:
        found = row["shardwise_seconds"]
        strategy = f"`{row['strategy']}`" if row["strategy"] else ""
        cells = [
            row["group"] or "(no group)",
            str(row["line"]),
            row["run"],
            strategy,
            *(format_seconds(row[key]) for key in ("measured_seconds", "predicted_seconds")),
            format_seconds(found) if found else row["reason"],
            f"{row['ratio']:.2f}" if found else "",
            format_bytes(row["predicted_memory_bytes"]),
            format_bytes(row["shardwise_memory_bytes"]) if found else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
