"""Folders of Parquet files as datasets: trained as by one process, and resumed within an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equality import check
from pool import Pools
from torch import nn

from shardwise.parallel.program import Program
from shardwise.run.training.job import Job, Options
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.parquet import ParquetRows
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

arrow = pytest.importorskip("pyarrow")
ROWS = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 rows in three files, of row groups of three rows, as a job of Spark leaves them."""
    import pyarrow.parquet

    made = tmp_path_factory.mktemp("rows")
    points = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, rows in enumerate((range(9), range(9, 10), range(10, ROWS))):
        table = arrow.table(
            {
                "row": list(rows),
                "features": [points[row].tolist() for row in rows],
                "label": [row % 3 for row in rows],
            }
        )
        pyarrow.parquet.write_table(table, made / f"part-{number:05}.parquet", row_group_size=3)
    (made / "_SUCCESS").touch()
    return made


class Rows:
    """Makes the workload; a class, so that equal ones share their reference."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def __call__(self) -> Workload:
        return Workload(
            name="rows",
            model=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).double(),
            dataset=ParquetRows(self.folder, ["features", "label"]),
            inputs=lambda batch: batch["features"],
            loss=lambda output, batch: F.cross_entropy(output, batch["label"]),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02),
            batch_size=8,
        )


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=4", "dp=2,tp=2"])
def test_equal_to_one_process(workers: Pools, folder: Path, strategy: str) -> None:
    check(workers, Rows(folder), strategy, steps=4)


def losses(folder: Path, strategy: str, steps: int, out: Path | None) -> list[float]:
    """Losses of a run up to a step, which goes on from the newest checkpoint in `out`."""
    work = Rows(folder)()
    options = Options(steps=steps, quiet=True, resume=out is not None)
    job = Job(source=Source(workload=work), strategy=Strategy.parse(strategy), options=options, folder=out)
    return [step.loss for step in train(Program.build(work, job.strategy), job).steps]


def test_resumed_within_an_epoch_under_another_strategy(workers: Pools, folder: Path, tmp_path: Path) -> None:
    (uninterrupted,) = workers(1, losses, folder, "single", 8, None)
    found: list[float] = []
    for strategy, steps in (("dp=2", 4), ("fsdp=2", 8)):
        found += workers(2, losses, folder, strategy, steps, tmp_path)[0]
    assert found == pytest.approx(uninterrupted, rel=1e-9)
