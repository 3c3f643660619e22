"""Numbers and data that are wrong, as a user sees them: one line, an exit status, and what there is to go on from."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from command import Run

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")

WORKLOAD = """
    import os
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    from shardwise import Workload

    def sick(bad: int = 20, short: int = 0) -> Workload:
        rank = int(os.environ.get("RANK", "0"))
        generator = torch.Generator().manual_seed(1)
        samples = 40 - short * rank
        data = torch.randn(samples, 4, generator=generator)
        data[bad:bad + 1] = float("nan")
        return Workload(
            name="sick",
            model=lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
            dataset=TensorDataset(data, torch.arange(samples) % 3),
            inputs=lambda batch: batch[0],
            loss=lambda output, batch: F.cross_entropy(output, batch[1]),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            batch_size=8,
        )
"""


@pytest.fixture
def sick(folder: Path) -> str:
    (folder / "sick.py").write_text(textwrap.dedent(WORKLOAD))
    return "sick.py:sick"


def told(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith(("shardwise: ", "step "))]


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["local", "torchrun"])
def test_a_loss_of_nan_stops_it(run: Run, folder: Path, sick: str, launcher: tuple[str, ...]) -> None:
    arguments = ("train", sick, "--strategy", "dp=2", "--checkpoint-every", "1", "--out", "out", "--quiet")
    done = run(*arguments, status=1, launcher=launcher)
    (line,) = told(done.stderr)
    assert "the loss is nan; the first that is not finite is module '0', of a batch that holds nan itself" in line
    newest = max(path.name for path in folder.glob("out/checkpoints/step-*"))
    assert f"the last finite checkpoint is out/checkpoints/{newest}: --resume" in line
    assert launcher or "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_is_skipped_is_in_the_document(run: Run, sick: str) -> None:
    done = run("train", sick, "--strategy", "dp=2", "--on-nan", "skip", "--out", "out", "--json")
    document = json.loads(done.stdout)
    assert document["steps"] == 5
    assert document["skipped_steps"] == 1
    (line,) = told(done.stderr)
    assert line.startswith(f"step {document['first_not_finite_step']}: the loss is nan")
    assert "  not finite     first at step" in done.stderr
    assert ", 1 update skipped" in done.stderr


def test_nothing_is_verified_by_nan(run: Run, sick: str) -> None:
    done = run("verify", sick, "--strategy", "dp=2", "--steps", "5", status=1)
    assert "holds nan on one worker and in parallel: that proves nothing" in done.stdout
    assert "most likely at fault" not in done.stdout


def test_a_comparison_tells_it(run: Run, sick: str) -> None:
    done = run("compare", sick, "--strategy", "single", "--strategy", "dp=2", "--quiet")
    for strategy in ("single", "dp=2"):
        assert f"{strategy}: loss or gradient are not finite from step " in done.stdout


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["local", "torchrun"])
def test_datasets_of_two_lengths_are_refused(run: Run, folder: Path, sick: str, launcher: tuple[str, ...]) -> None:
    arguments = ("train", sick, "--strategy", "dp=2", "--set", "short=8", "--out", "out", "--quiet")
    done = run(*arguments, status=1 if launcher else 2, launcher=launcher)
    (line,) = told(done.stderr)
    assert line == (
        "shardwise: the dataset of workload 'sick' has 40 samples on rank 0, 32 samples on rank 1: it must be the same "
        "on every worker"
    )
    assert launcher or done.stderr == f"{line}\n"
