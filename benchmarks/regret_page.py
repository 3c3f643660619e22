"""The page of the regret benchmark, from what it recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness import RESULTS, table

PAGE = RESULTS.parent.parent / "docs/regret.md"

INTRODUCTION = """# How well the planner chooses

Written by `python -m benchmarks.regret`. Two hosts of one core each, made of network namespaces, are joined by a link
of 10 Gb/s, 1 Gb/s or 100 Mb/s. Their workers measure them as `shardwise calibrate` does, and plan. Then they train
under these strategies:

- the chosen one and the next best,
- the best of every combination of axes,
- the usual defaults: DDP (which is also what Accelerate uses), FSDP, and tensor parallelism alone.

The regret of a strategy is its step time over that of the fastest strategy that was measured, minus one. The planner
aims at 2% on average and 10% at worst. Two measurements of one strategy differ by a few percent on a small machine,
so the fastest of several almost equal strategies is partly chance.

In the second table, the columns `regret`, `DDP`, `FSDP` and `tensor parallel` are regrets: the first is the
planner's. `tried` is the number of strategies that were measured.
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
