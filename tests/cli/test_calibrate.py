"""`shardwise calibrate` refuses wrong requests before it measures anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import BOX, Run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", "0"), "workers=0: must be 1 or more"),
        (("--workers", "two"), "'two' is not a whole number"),
        (("--out", "."), ".: is a folder, give a file"),
        (("--out", "work.py/cluster.toml"), "work.py/cluster.toml: cannot be written"),
        (("--output", "x.toml"), "did you mean '--out'?"),
    ],
)
def test_refused(run: Run, arguments: tuple[str, ...], said: str) -> None:
    done = run("calibrate", *arguments, status=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


CURVE = """
[[devices.box.curves]]
kind = "memory"
operation = "aten.add"
dtype = "float32"
samples = [[1000, 1e-6, 0.1]]
"""


def test_a_file_without_the_threads_that_are_needed(run: Run, folder: Path) -> None:
    (folder / "box.toml").write_text(BOX.replace("cores = 2", "cores = 8") + CURVE)
    done = run("simulate", "work.py:small", "--cluster", "box.toml", "--strategy", "dp=2", status=2)
    assert (
        "Box was not measured with 2 workers of 4 threads each, only 1 with 1: use shardwise calibrate" in done.stderr
    )
