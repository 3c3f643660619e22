"""The page of the learning benchmark, from what it recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.harness import RESULTS, table

PAGE = RESULTS.parent.parent / "docs/learning.md"

INTRODUCTION = """# What communicating less costs in learning

Written by `python -m benchmarks.learning`. Each recipe is trained on 2 workers by data parallelism (`dp=2`) and under
[means that send less](strategies.md): with as many samples, the workload's own optimizer and learning rate, and {seeds}
seeds. Nothing was tuned for any of them. Samples are smaller than usual: {changed}.
The seconds of a step are measured on two hosts of one core each (network namespaces) with a shaped link between them.

- `loss` is that of held-out samples after all steps: {steps}. It is the mean over the seeds and its standard deviation.
  Replicas that take local steps are evaluated at the mean of their parameters. `=` marks a loss within the spread of
  `dp=2`, `<` a lower one, `>` a higher one.
- `MB a step` is what one host sent in a step, as its network device counts, and `fewer bytes` how many times less that
  is than what `dp=2` sent.
- With `a slow host`, the second host sleeps for as long as a step takes without the link.
- `s to the loss` is the time to the loss that `dp=2` ends with (plus its spread), for the median seed, and in brackets
  how many times sooner that is than by `dp=2` on the same link. `-` means that fewer than half of the seeds reach it.
"""


def write_page(name: str) -> None:
    """Write docs/learning.md from the results `name`, and those beside them whose names begin so: further links."""
    files = [RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}-*.json"))]
    all_found = [json.loads(file.read_text()) for file in files]
    found, rows = all_found[0], [row for each in all_found for row in each["rows"]]
    settings = found["settings"]
    steps = ", ".join(f"{count} ({recipe})" for recipe, count in settings["steps"].items())
    changed = ", ".join(
        f"`{recipe}` with " + " and ".join(f"`{option}={value}`" for option, value in options.items())
        for recipe, options in settings["changed"].items()
        if options
    )
    parts = [INTRODUCTION.format(seeds=settings["seeds"], steps=steps, changed=changed), "## Loss and bytes\n"]
    first = [row for row in rows if (row["Mb/s"], row["slow"]) == (rows[0]["Mb/s"], rows[0]["slow"])]
    parts += [table(learned(first)), "", "## Time to the same loss\n"]
    parts += [table(timed(rows)), ""]
    commands = ", ".join(f"`{each['command']}`" for each in all_found)
    parts.append(f"{found['date']}, {found['cpus']} cores, torch {found['torch']}: {commands}\n")
    PAGE.write_text("\n".join(parts))


def learned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each recipe and strategy: what the link does not change."""
    plain = {row["recipe"]: row for row in rows if row["strategy"] == "dp=2"}
    return [
        {
            "recipe": row["recipe"],
            "strategy": f"`{row['strategy']}`",
            "loss": f"{row['loss']:.3g} ± {row['spread']:.2g}",
            "": compared(row, plain[row["recipe"]]),
            "MB a step": f"{row['MB sent']:.3g}",
            "fewer bytes": f"{row['fewer bytes']:.3g}",
        }
        for row in rows
    ]


def compared(row: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """Return how a loss compares with that of data parallelism: a sign, `=` within its spread."""
    difference = row["loss"] - plain["loss"]
    if abs(difference) <= plain["spread"]:
        return "="
    return "<" if difference < 0 else ">"


def timed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each recipe and strategy, with columns for each link."""

    def which(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["recipe"], row["strategy"]

    order = {each: number for number, each in enumerate(dict.fromkeys(map(which, rows)))}
    found = []
    for (recipe, strategy), same in groupby(sorted(rows, key=lambda row: order[which(row)]), which):
        cells = {"recipe": recipe, "strategy": f"`{strategy}`"}
        for row in same:
            where = named(row)
            cells[f"ms a step, {where}"] = f"{row['step ms']:.3g}"
            reached = row["s to loss"] != "-"
            cells[f"s to the loss, {where}"] = f"{row['s to loss']:.3g} ({row['faster']:.2g} times)" if reached else "-"
        found.append(cells)
    return found


def named(row: Mapping[str, Any]) -> str:
    """Return the name of a link, and of a slow host."""
    rate = f"{row['Mb/s'] / 1000:g} Gb/s" if row["Mb/s"] >= 1000 else f"{row['Mb/s']} Mb/s"
    return f"{rate}, a slow host" if row["slow"] else rate
