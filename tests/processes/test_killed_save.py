"""A process that is killed while it saves leaves the checkpoint before that one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from standin import StandIn

from shardwise.run.checkpoint.checkpoints import Checkpoints

TESTS = Path(__file__).parents[1]


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(checkpoints: Checkpoints) -> Path:
    path = checkpoints.latest()
    assert path is not None
    return path


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from standin import StandIn
from shardwise.run.checkpoint.checkpoints import Checkpoints

def save_for_ever(run, ready):
    checkpoints = Checkpoints(run, keep=2)
    for step in range(1, 10**6):
        weights = {f"w{i}": torch.full((512, 64), float(step)) for i in range(8)}
        checkpoints.save(StandIn(weights, steps=step), {"step": step})
        if step == 2:
            checkpoints.wait()
            os.write(ready, b"x")

for attempt in range(8):
    heard, ready = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(Path(sys.argv[1], str(attempt)), ready)
    os.read(heard, 1)
    time.sleep(0.0037 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kill_in_the_middle_never_costs_more_than_the_last_one(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(TESTS)], check=True, env=environment, timeout=300)
    left = []
    for run in tmp_path.iterdir():
        left += [name for name in folders(run) if name.endswith(".partial")]
        checkpoints = Checkpoints(run)
        program = StandIn({f"w{i}": torch.zeros(512, 64) for i in range(8)})
        step = checkpoints.load(program, newest(checkpoints))["step"]
        assert step >= 2
        assert all(bool((tensor == step).all()) for tensor in program.locals().values())
        checkpoints.save(program, {"step": step})
        checkpoints.wait()
        assert not [name for name in folders(run) if name.startswith(".")]
    assert left, "no kill came in the middle of a save"
