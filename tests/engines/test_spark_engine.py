"""Spark alone: masters that do not answer, clusters that are too small, tasks that are lost, no Spark and no Java."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from daemons import Daemons, free_ports
from ways import SECONDS, SHARDWISE, WAYS, await_no_process, await_steps, processes_with, start

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.xdist_group("spark")]

TRAIN = (*SHARDWISE, "train", "work.py:small", "--strategy", "dp=2", "--quiet", "--no-proof", "--engine", "spark")


def refused(*more: str) -> str:
    """Return the one line that a wrong request gets."""
    done = subprocess.run((*TRAIN, *more), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert not Path("out").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("shardwise: ")]
    return line


def test_a_master_that_does_not_answer_is_named() -> None:
    (port,) = free_ports(1)
    line = refused("--hosts", f"spark://127.0.0.1:{port}")
    assert f"127.0.0.1:{port} cannot be reached" in line
    assert "nothing was started" in line


@pytest.mark.parametrize("hosts", ["a,b", "spark://a:1,spark://b:1", "spark://a"])
def test_hosts_are_one_master(hosts: str) -> None:
    assert f"--hosts {hosts}: engine spark takes its master alone" in refused("--hosts", hosts)


def test_a_cluster_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--master local[1] pyspark-shell")
    assert "the strategy needs 2 workers, the cluster has 1 free slots: use --workers 1" in refused()


def test_without_spark_its_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (folder / "pyspark.py").write_text("raise ImportError('hidden by the test')\n")
    assert "pyspark is not installed: install it with pip install pyspark" in refused()


def test_without_java_its_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert "java is not installed: install Java 17 or later (Debian: apt-get install default-jre-headless)" in refused()


def test_a_task_that_is_lost_ends_the_job(folder: Path, mark: str, spark: Daemons) -> None:
    before = spark.logs().count("Registered app shardwise")
    (way,) = [way for way in WAYS if way.engine == "spark"]
    length = ("--epochs", "500", "--set", "pause=0.05", "--out", "out", "--quiet", "--no-proof")
    process = start(way, 2, "--strategy", "dp=2", *length)
    await_steps(folder / "out", process)
    assert spark.logs().count("Registered app shardwise") == before + 1
    (worker,) = [each for each in processes_with(mark) if b"\0RANK=1\0" in Path(f"/proc/{each}/environ").read_bytes()]
    task = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
    os.kill(task, signal.SIGKILL)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "shardwise: worker 1 is lost: its task of Spark has ended" in errors
    await_no_process(mark)
