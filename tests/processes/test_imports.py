"""Fresh interpreters: the package starts quickly, and imports torch only where it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = (
    "shardwise",
    "shardwise.cli",
    "shardwise.launch.local",
    "shardwise.launch.join",
    "shardwise.splitting.balance",
    "shardwise.splitting.buckets",
    "shardwise.splitting.ownership",
    "shardwise.splitting.schedule",
    "shardwise.splitting.slow_links",
    "shardwise.workload.load",
    "shardwise.workload.workload",
)
"""Modules that are imported before it is known whether torch is needed."""


IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def test_import_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *WITHOUT_TORCH], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-c", "import shardwise"], [str(Path(sys.executable).with_name("shardwise")), "--help"]],
    ids=["import", "--help"],
)
def test_starts_quickly(command: list[str]) -> None:
    # processor time of the quickest of three: other work on the machine does not count
    resource = pytest.importorskip("resource")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3
