"""The page of the regret benchmark, from what it recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness import RESULTS, table

PAGE = RESULTS.parent.parent / "docs/regret.md"

INTRODUCTION = """# How well the planner chooses

Written by `python -m benchmarks.regret`. Two hosts of one core each, made of network namespaces, are joined by a link
of 10 Gb/s, 1 Gb/s or 100 Mb/s. Their workers measure them as `shardwise calibrate` does, plan, and then train what was
chosen, the next best, the best of every combination of axes, and what people take without asking: DDP (which is what
Accelerate does, too), FSDP, tensor parallelism alone.

Regret is the time of a step over that of the fastest strategy of all that were measured, minus one. It is aimed at 2%
on average and 10% at worst. The fastest of several that are as good as equal is so by chance: a few percent is what two
measurements of one strategy differ by on a small machine.
"""


def write_page(name: str, usual: Iterable[str]) -> None:
    """Writes docs/regret.md; `usual`: the columns of the usual defaults."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    settings, names = found["settings"], ("planner", *usual)
    shares = {"regret", *usual}
    means = [
        {"": each, "mean regret": f"{settings[mean]:.1%}", "worst regret": f"{settings[worst]:.1%}"}
        for each in names
        if (mean := f"{each}: mean regret") in settings and (worst := f"{each}: worst regret") in settings
    ]
    facts = f"{found['date']}, {found['cpus']} cores, torch {found['torch']}: `{found['command']}`"
    rows = [_shown(row, shares) for row in found["rows"]]
    PAGE.write_text("\n".join([INTRODUCTION, table(means), "", table(rows), "", facts, ""]))


def _shown(row: Mapping[str, Any], shares: set[str]) -> dict[str, str]:
    def text(key: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.1%}" if key in shares else f"{value:.0f}"
        return f"`{value}`" if key in ("chosen", "fastest") else str(value)

    return {key: text(key, value) for key, value in row.items()}
