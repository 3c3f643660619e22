"""Write docs/plans.md: the choices of `shardwise plan` for large models, beside configurations that others published.

python docs/write_plans.py [NAME ...]

The commands on the page print everything on it, except the measured times: those are read from tests/published.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.reports.plan import plan_summary

HERE = Path(__file__).parent
PAGE = HERE / "plans.md"
RUNS = HERE.parent / "tests/published/runs.csv"

LLAMA = "kv_heads=8,vocabulary=128256,sequence=8192"


@dataclass(frozen=True)
class Published:
    """A configuration that others trained with.

    Attributes:
        who: who published it, and where.
        strategy: the strategy, as Shardwise spells it.
        differs: differences that the strategy cannot express.
        row: map from column to value of the row in runs.csv that measured it; None if there is no such row.
    """

    who: str
    strategy: str
    differs: str = ""
    row: dict[str, str] | None = None


@dataclass(frozen=True)
class Case:
    """One model on one cluster."""

    name: str
    title: str
    workload: str
    cluster: str
    published: tuple[Published, ...]

    @property
    def command(self) -> list[str]:
        return ["shardwise", "plan", self.workload, "--cluster", self.cluster]


CASES = (
    Case(
        "llama-8b",
        "Llama 3 8B on 64 A100",
        f"gpt:layers=32,hidden=4096,heads=32,ffn=14336,batch_size=64,{LLAMA}",
        "a100-80x64",
        (
            Published(
                "torchtitan, docs/performance.md (2024)",
                "fsdp=64,recompute=1/2",
                "it recomputes every second block, not the first half of them",
                {"group": "torchtitan", "model": "Llama3-8B", "n_gpus": "64", "recompute": "selective layer"},
            ),
        ),
    ),
    Case(
        "llama-70b",
        "Llama 3 70B on 64 A100",
        f"gpt:layers=80,hidden=8192,heads=64,ffn=28672,batch_size=64,{LLAMA}",
        "a100-80x64",
        (
            Published(
                "torchtitan, docs/performance.md (2024)",
                "fsdp=64,recompute=full",
                "",
                {"group": "torchtitan", "model": "Llama3-70B", "n_gpus": "64", "recompute": "full"},
            ),
        ),
    ),
    Case(
        "llama-405b-gb200",
        "Llama 3.1 405B on 256 GB200",
        f"gpt:layers=126,hidden=16384,heads=128,ffn=53248,batch_size=1536,{LLAMA}",
        "gb200x256",
        (
            Published(
                "Megatron-Bridge, performance summary, 26.06",
                "dp=4,tp=4,sp=1,pp=16,microbatches=384,schedule=interleaved,stages=4",
                "its matmuls are in FP8, and the replicas split its optimizer state",
                {
                    "group": "Megatron-Bridge GB200",
                    "model": "LLAMA3.1_405B",
                    "tp": "4",
                    "pp": "16",
                    "vpp": "4",
                    "precision": "FP8",
                },
            ),
        ),
    ),
    Case(
        "llama-405b-h100",
        "Llama 3.1 405B on 16,384 H100",
        f"gpt:layers=126,hidden=16384,heads=128,ffn=53248,batch_size=2048,{LLAMA}",
        "h100x16384",
        (
            Published(
                "Dubey et al. 2024, The Llama 3 Herd of Models, table 4",
                "fsdp=128,zero=2,tp=8,sp=1,pp=16,microbatches=16,schedule=interleaved,stages=8",
                "its schedule was modified by hand, and its parameters are all-gathered once per step",
            ),
        ),
    ),
    Case(
        "gpt-1t",
        "GPT of 1 T parameters on 3,072 A100",
        "gpt:layers=128,hidden=25600,heads=160,vocabulary=51200,sequence=2048,batch_size=3072",
        "a100-80x3072",
        (
            Published(
                "Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters, table 1",
                "dp=6,tp=8,pp=64,microbatches=512,recompute=full",
                "",
            ),
        ),
    ),
)


def main(names: list[str]) -> None:
    cases = [case for case in CASES if not names or case.name in names]
    page = "\n".join([INTRODUCTION, *(text(case) for case in cases)])
    PAGE.write_text(page)


INTRODUCTION = """# Plans for large models

This page shows what `shardwise plan` chooses for models that are too large for a laptop. `make plans` writes it with
the commands that are shown. Each command ran without a GPU, on one core, in the time that its last line states.

Configurations that others published are predicted by the same program (`simulate`). Their measured step time stands
beside the prediction if it is among [the published runs](accuracy.md). Predictions rest on datasheets and on
constants that were fitted once.
"""


NOT_RUN = "<!-- not run: make plans runs it, which takes up to a few minutes -->"


def text(case: Case) -> str:
    """Return a section of the page."""
    plan = document([*case.command[1:], "--json"])
    shown = plan_summary(plan)  # what the command prints without --json
    rows = [_row("chosen", plan["best"], plan["candidates"][0], None)]
    notes = []
    for entry in case.published:
        simulated = document(
            ["simulate", case.workload, "--cluster", case.cluster, "--strategy", entry.strategy, "--json"]
        )
        rows.append(_row(entry.who, entry.strategy, simulated["candidates"][0], measured(entry)))
        if entry.differs:
            notes.append(f"{entry.who}: {entry.differs}.")
    head = ["| configuration | strategy | step, predicted | memory, predicted | step, measured |", "| --- " * 5 + "|"]
    command = " ".join(case.command)
    return "\n".join(
        [
            f"## {case.title}",
            "",
            NOT_RUN,
            "```bash",
            command,
            "```",
            "",
            "```text",
            shown.rstrip(),
            "```",
            "",
            *head,
            *rows,
            "",
        ]
        + [line for note in notes for line in (note, "")]
    )


def _row(name: str, strategy: str, found: dict[str, Any], seconds: float | None) -> str:
    memory = f"{found['memory_bytes'] / 2**30:.1f} GiB" + ("" if found["fits"] else ", does not fit")
    last = "" if seconds is None else f"{seconds:.2f} s"
    return f"| {name} | `{strategy}` | {found['step_seconds']:.2f} s | {memory} | {last} |"


def measured(entry: Published) -> float | None:
    """Return the step seconds of the first row that matches. Returns None if the entry names no row.

    Raises SystemExit if no row matches.
    """
    if entry.row is None:
        return None
    with RUNS.open(newline="") as file:
        for row in csv.DictReader(file):
            if all(row[column] == value for column, value in entry.row.items()):
                return float(row["target_step_time_s"])
    raise SystemExit(f"no row of {RUNS} has {entry.row}")


def run(arguments: list[str]) -> str:
    command = [str(Path(sys.executable).with_name("shardwise")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def document(arguments: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(arguments))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
