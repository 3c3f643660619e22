"""Slurm alone: batch scripts, requeued jobs, allocations of other sizes, nodes that are gone, ranks in any order."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from ways import SHARDWISE, await_no_process

pytestmark = [pytest.mark.usefixtures("folder", "slurm"), pytest.mark.xdist_group("slurm")]

TRAIN = (*SHARDWISE, "train", "work.py:small", "--strategy", "dp=2", "--quiet", "--no-proof")


def call(*line: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL)


def await_text(path: Path, text: str, seconds: float = 120.0) -> str:
    end = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, path.read_text() if path.exists() else "nothing was written"
        time.sleep(0.2)
    return path.read_text()


def submitted(folder: Path, *arguments: str) -> str:
    """Write a batch script, submit it, and return the number of its job."""
    script = call(*TRAIN, *arguments, "--engine", "slurm", "--dry-run")
    assert script.returncode == 0, script.stderr
    (folder / "job.sh").write_text(script.stdout)
    told = call("sbatch", "--partition=low", "job.sh")
    job = re.search(r"Submitted batch job (\d+)", told.stdout)
    assert job is not None, told.stderr
    return job[1]


def test_a_batch_script_trains(folder: Path) -> None:
    job = submitted(folder, "--steps", "3")
    await_text(folder / f"slurm-{job}.out", "rank 1 of 2")
    summary = folder / "runs" / f"slurm-{job}" / "summary.json"
    await_text(summary, '"steps": 3')


def test_a_requeued_job_goes_on(folder: Path, mark: str) -> None:
    length = ("--steps", "200", "--checkpoint-every", "2", "--set", "pause=0.2")
    job = submitted(folder, *length, "--out", "out")
    metrics = folder / "out" / "metrics.jsonl"
    await_text(metrics, '"step": 6')
    assert call("scontrol", "requeue", job).returncode == 0
    await_no_process(mark, 60)
    before = sorted(path.name for path in (folder / "out" / "checkpoints").glob("step-*"))
    call("scontrol", "update", f"JobId={job}", "StartTime=now")
    output = await_text(folder / f"slurm-{job}.out", "rank 1 of 2")
    end = time.monotonic() + 180
    while output.count("rank 1 of 2") < 2:
        assert time.monotonic() < end, output
        call("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1.0)
        output = (folder / f"slurm-{job}.out").read_text()
    assert before
    newest = int(before[-1].removeprefix("step-"))
    await_text(metrics, f'"step": {newest + 2}')
    call("scancel", job)
    await_no_process(mark, 60)


def test_an_allocation_of_another_size_is_refused() -> None:
    done = call("salloc", "--ntasks=3", *TRAIN, "--steps", "2", "--engine", "slurm")
    assert done.returncode == 2
    assert "the strategy needs 2 workers, the allocation" in done.stderr
    assert "was made for 3 tasks" in done.stderr


def test_an_allocation_is_used(folder: Path) -> None:
    line = (*SHARDWISE, "train", "work.py:small", "--quiet", "--no-proof", "--out", "out")
    done = call("salloc", "--nodes=2", "--ntasks=2", *line, "--steps", "2", "--engine", "slurm")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2, 0 of 1, by slurm" in done.stderr


def test_a_plan_reads_the_allocation() -> None:
    plan = (*SHARDWISE, "plan", "gpt:layers=2,hidden=64,heads=4", "--engine", "slurm", "--json", "--cluster")
    done = call("salloc", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", *plan, "h100x4")
    assert done.returncode == 2
    assert "the allocation has 2 + 2 tasks on its nodes, h100x4 has 4 devices" in done.stderr
    done = call("salloc", "--nodes=1", "--ntasks=3", *plan, "h100x4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["workers"] == 3


def test_a_step_of_another_size_is_refused_once() -> None:
    done = call("srun", "--ntasks=3", *TRAIN, "--steps", "2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("strategy dp=2 needs 2 workers, there are 3") == 1


def test_nodes_that_are_gone_are_named_before_anything_starts(mark: str) -> None:
    done = call(*TRAIN, "--steps", "2", "--engine", "slurm", "--hosts", "n1,gone,nowhere")
    assert done.returncode == 2
    assert "gone (down" in done.stderr
    assert "nowhere (unknown) cannot be reached: nothing was started" in done.stderr
    await_no_process(mark)


def test_rank_0_need_not_be_on_the_first_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "hosts").write_text("n2\nn1\n")
    monkeypatch.setenv("SLURM_HOSTFILE", str(folder / "hosts"))
    done = call("srun", "--ntasks=2", "--distribution=arbitrary", *TRAIN, "--steps", "3", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2, 0 of 1, by slurm" in done.stderr


def test_without_slurm_its_package_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    done = call(*TRAIN, "--engine", "slurm")
    assert done.returncode == 2
    assert "engine slurm: srun is not installed: install Slurm's client programs" in done.stderr


def test_the_cluster_is_of_two_nodes(slurm: SlurmCluster) -> None:
    assert "n[1-2]" in slurm.ask("sinfo", "-h", "-p", "low", "-o", "%N")
