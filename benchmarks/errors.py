"""Write the table of relative errors that ranges of predictions rest on: predict/hardware/errors.json.

    python -m benchmarks.errors

For GPUs by their datasheets: the error that nine in ten published runs keep, each group of runs with equal weight,
times the ratio of the errors of cross-validation to those of the fit, because constants were fitted to these very runs.
For machines that were measured: the error that nine in ten rows of benchmarks/results/this-machine.json keep whose
workers have a core each; where they have not, the scatter of equal steps is far larger and counts by itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwise import api
from shardwise.predict.hardware import uncertainty

HERE = Path(__file__).parent
RUNS = HERE.parent / "tests" / "published" / "runs.csv"
MEASURED = HERE / "results" / "this-machine.json"
TABLE = Path(uncertainty.__file__).with_name("errors.json")
KEPT = 0.9


def main() -> None:
    """Write the table."""
    document = api.validate(RUNS)
    fit = document["fit"]
    unseen = fit["held_out_mean_of_groups"] / fit["mean_of_groups"]
    rows = [(_kind(row["run"]), row["group"], abs(row["error"])) for row in document["predictions"]]
    found = {kind: unseen * _kept([row[1:] for row in rows if row[0] == kind]) for kind in sorted({r[0] for r in rows})}
    measured: dict[str, Any] = json.loads(MEASURED.read_text())
    own = [row for row in measured["rows"] if row["workers"] <= measured["cpus"]]
    found["measured"] = _kept([("", abs(row["error"])) for row in own])
    errors = {kind: round(value, 3) for kind, value in found.items()}
    TABLE.write_text(json.dumps({"written_by": "python -m benchmarks.errors", "errors": errors}, indent=1) + "\n")
    print(TABLE.read_text(), end="")


def _kind(run: str) -> str:
    """Return the kind of a row from its label: "... tp=2 pp=1 dp=8, ..."."""
    found = re.search(r"\btp=(\d+) pp=(\d+)\b", run)
    assert found is not None, run
    return uncertainty.kind_of(int(found[1]), int(found[2]))


def _kept(rows: Sequence[tuple[str, float]]) -> float:
    """Return the error that `KEPT` of the rows keep, each group with equal weight; rows are (group, error)."""
    sizes = Counter(group for group, _ in rows)
    seen = 0.0
    for group, error in sorted(rows, key=lambda row: row[1]):
        seen += 1 / sizes[group] / len(sizes)
        if seen >= KEPT - 1e-9:
            return error
    raise AssertionError("no rows")


if __name__ == "__main__":
    main()
