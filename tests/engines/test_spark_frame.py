"""A DataFrame of Spark as dataset: written by Spark, and read by a job of Spark so that no row is read twice."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from ways import SHARDWISE

pytestmark = pytest.mark.xdist_group("spark")

ROWS = 30

WRITE = f"""
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import Vectors
    from pyspark.sql import SparkSession
    from shardwise.workload.parquet import ParquetRows

    spark = SparkSession.builder.config("spark.ui.enabled", "false").getOrCreate()
    rows = [(row, Vectors.dense([row / {ROWS}, 1.0]), row % 3) for row in range({ROWS})]
    frame = spark.createDataFrame(rows, ["row", "vector", "label"]).repartition(3)
    frame = frame.select("row", "label", vector_to_array("vector").alias("features"))
    found = ParquetRows.from_frame(frame, "rows")
    print(sorted((int(each["row"]), int(each["label"]), round({ROWS} * float(each["features"][0]))) for each in found))
"""

TRAIN = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from shardwise import Workload
    from shardwise.workload.parquet import ParquetRows

    def table() -> Workload:
        def loss(output, batch):
            print("rows", *batch["row"].tolist(), flush=True)
            return F.cross_entropy(output, batch["label"])

        return Workload(
            name="table",
            model=lambda: nn.Linear(2, 3),
            dataset=ParquetRows("rows"),
            inputs=lambda batch: batch["features"].float(),
            loss=loss,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            batch_size=10,
        )
"""


def call(*line: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.usefixtures("spark")
def test_each_row_of_a_frame_is_read_once_in_an_epoch(folder: Path) -> None:
    (folder / "write.py").write_text(textwrap.dedent(WRITE))
    written = call(sys.executable, "write.py")
    assert written.stdout.strip() == str([(row, row % 3, row) for row in range(ROWS)])
    assert len(list((folder / "rows").glob("*.parquet"))) > 1
    (folder / "table.py").write_text(textwrap.dedent(TRAIN))
    options = ("--strategy", "dp=2", "--epochs", "2", "--engine", "spark", "--quiet", "--no-proof", "--out", "out")
    done = call(*SHARDWISE, "train", "table.py:table", *options)
    read = Counter(
        int(row) for line in done.stderr.splitlines() if line.startswith("rows ") for row in line.split()[1:]
    )
    assert read == dict.fromkeys(range(ROWS), 2)
