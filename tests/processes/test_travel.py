"""A workload of a file is unpickled where that file cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cloudpickle

from shardwise.workload.load import load_workload

FILE = """
from shardwise import Workload

def make(layers: int = 2, rate: float = 0.1, kind: str = "a") -> Workload:
    name = f"{layers}-{rate}-{kind}"
    return Workload(name=name, model=len, dataset=[], inputs=len, loss=len, optimizer=len, batch_size=4)
"""


def test_workload_of_a_file_travels(tmp_path: Path) -> None:
    """A process that cannot import the file can unpickle its workload."""
    path = tmp_path / "good.py"
    path.write_text(FILE)
    data = cloudpickle.dumps(load_workload(f"{path}:make"))
    code = "import sys, cloudpickle; print(cloudpickle.loads(sys.stdin.buffer.read()).name)"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "2-0.1-a"
