"""The document that the test of models writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import catalogue

HEAD = """# Models that were tried

Written by `make models` (tests/multiprocess/test_catalogue.py), never by hand. Every model is built unmodified from its
configuration, with random weights and few, small layers. The code of `shardwise verify` trains it in float64 for
{steps} steps under each strategy, and for the same steps in one process. Dropout is the model's own, gradients are
clipped, and the optimizer is AdamW.

A cell is the largest relative error of any loss, gradient, updated parameter or buffer, rounded up to a power of ten.
`sharded` is the share of the parameters that `tp=2` splits. `cut points` is the number of points at which a pipeline
may cut the small model; more layers have more of them.

"""

WHOLE = """
## Parameters that tensor parallelism does not split

The share is that of the small model's parameters under `tp=2`; it falls with the width of a model. "takes all of it"
means that the operation needs the whole tensor. Norms, and biases that are added after an all-reduce, are whole by
design, because the tensors that they apply to are whole.

| model | share | reason | parameters |
| --- | ---: | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """Findings of the test of one model under one strategy."""

    error: float
    steps: int
    share: float
    uncut: tuple[tuple[str, tuple[str, ...], float], ...]
    places: int | None

    @classmethod
    def of(cls, proof: Any) -> Cell:
        error = max(proof.loss.error, proof.gradient.error, proof.parameter.error)
        uncut = tuple((each.reason, each.names, each.share) for each in proof.uncut)
        return cls(error, proof.steps, proof.sharded_share, uncut, proof.cut_points)


def write(path: Path, cells: Mapping[tuple[str, str], Cell], strategies: Sequence[str]) -> None:
    steps = next(iter(cells.values())).steps
    columns = ["model", "sharded", "cut points", *(f"`{strategy}`" for strategy in strategies)]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    whole = []
    for model in catalogue.KINDS:
        split, stages = (next(cells[model, s] for s in strategies if s.startswith(axis)) for axis in ("tp=", "pp="))
        errors = [_power(cells[model, strategy].error) for strategy in strategies]
        name = catalogue.name_of(model)
        lines.append(_row([name, f"{split.share:.1%}", str(stages.places), *errors]))
        whole += [_row([name, f"{share:.1%}", reason, _names(names)]) for reason, names, share in split.uncut]
    path.write_text(HEAD.format(steps=steps) + "\n".join(lines) + "\n" + WHOLE + "\n".join(whole) + "\n")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _power(error: float) -> str:
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error)):+03d}"


def _names(names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"`{names[0]}`{others}"
