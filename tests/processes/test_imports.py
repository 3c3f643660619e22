"""Fresh interpreters: the package starts quickly, and imports torch only where it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_TORCH = (
    "shardwise",
    "shardwise.cli",
    "shardwise.commands.report",
    "shardwise.launch.local",
    "shardwise.launch.join",
    "shardwise.run.live.follower",
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


STARTED = """
import sys
before = set(sys.modules)  # what the environment itself loads into every interpreter
from shardwise.cli import command
try:
    command()
finally:
    loaded = set(sys.modules) - before
    print(sorted(loaded - {n for n in loaded if n.split(".")[0] in {*sys.stdlib_module_names, "shardwise"}}))
    print(len(loaded))
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_starts_quickly(option: str) -> None:
    # what takes time is what is imported, and that can be counted: nothing foreign, and little in all
    command = [sys.executable, "-c", STARTED, option]
    foreign, loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-2:]
    assert foreign == "[]"
    assert int(loaded) < 150
