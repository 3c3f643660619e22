"""A process that tests fork from one that has imported torch is, but for that, as if it were started afresh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

SHOW = """
import os, sys
print(__name__, sys.argv, os.getcwd(), sys.path[0], os.environ["SHOWN"], sys.stdin.read(), os.getsid(0) == os.getpid())
sys.stderr.write("to standard error")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOWN", "shown")
    return tmp_path.resolve()


def fresh(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("sys.exit('in words')", 1),
        ("raise ValueError('odd')", 1),
        ("os._exit(5)", 5),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.kill(os.getpid(), 15)", -15),
        ("import atexit; atexit.register(print, 'at exit')", 0),
        ("import threading; threading.Timer(0.05, print, ['from a thread']).start()", 0),
    ],
)
@pytest.mark.parametrize("way", ["module", "script"])
def test_it_runs_and_ends_in_the_same_way(way: str, end: str, status: int, folder: Path) -> None:
    (folder / "shown.py").write_text(f"{SHOW}\nsys.stdout.flush()\n{end}\n")
    line = [sys.executable, *(("-m", "shown") if way == "module" else ("shown.py",)), "one", "two words"]
    expected, found = fresh(line, folder), warm.run(line, cwd=folder, timeout=60)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]
    assert found.returncode == status


def test_torch_is_there_and_computes_with_the_threads_that_are_asked_for(folder: Path) -> None:
    code = "import os, sys; early = 'torch' in sys.modules; import torch; print(early, torch.get_num_threads())"
    (folder / "loaded.py").write_text(code)
    done = warm.run([sys.executable, "loaded.py"], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=60)
    assert done.stdout == "True 2\n"


def test_draws_differ(folder: Path) -> None:
    code = "import random; import numpy as np; print(random.random(), np.random.rand())"
    (folder / "draws.py").write_text(code)
    drawn = {warm.run([sys.executable, "draws.py"], cwd=folder, timeout=60).stdout for _ in range(3)}
    assert len(drawn) == 3


def test_its_environment_is_found_while_it_runs(folder: Path) -> None:
    (folder / "waits.py").write_text("import time; print('waiting', flush=True); time.sleep(100)")
    process = warm.Started([sys.executable, "waits.py"], cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    assert b"SHOWN=shown" in warm.environment(Path("/proc", str(process.pid)))
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.communicate() == ("", "")
    assert process.returncode == -9
    assert not Path("/proc", str(process.pid)).exists()
