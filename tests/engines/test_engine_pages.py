"""The commands of docs/engines.md that need an engine are run as shown, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
BLOCK = re.compile(r"<!-- not run: on the engine, by make engines -->\n```bash\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.xdist_group("slurm")

COMMANDS = [line for block in BLOCK.findall(PAGE.read_text()) for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


def test_every_engine_is_there() -> None:
    words = " ".join(COMMANDS)
    assert all(f"--engine {engine}" in words for engine in ("torchrun", "mpi", "slurm", "ray", "spark"))


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env={**os.environ, "PATH": path},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
