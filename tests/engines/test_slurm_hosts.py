"""Slurm over two hosts with a slow link between them: a job trains there, and sees which link is slow."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Node, SlurmCluster
from two_hosts import on_host
from ways import SHARDWISE, await_no_process

from benchmarks import hosts
from shardwise.cluster.toml_reader import read_cluster

RATE = 1e9
"""Bits per second of the link between the hosts."""

pytestmark = pytest.mark.xdist_group("hosts")  # as all that is on hosts, which have one address each


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A node on each of two hosts; the controller is on the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "PREFIX", "engines")
        with hosts.hosts(RATE):
            nodes = [
                Node(hosts.name(n), hosts.name(n), hosts.address(n), hosts.inside(n), cpus=2)
                for n in range(hosts.HOSTS)
            ]
            found = SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes)
            yield found
            found.close()


@pytest.fixture(autouse=True)
def on_cluster(cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


def on_first(*line: str) -> tuple[str, str]:
    """Return the output and the errors of a command on the first host."""
    process = on_host(0, *line)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return output, errors


SRUN = ("srun", "-N", "2", "-n", "4")


DEALT_OUT = (*SRUN, "--distribution", "cyclic")
"""Slurm gives ranks 0 and 2 to the first host, 1 and 3 to the second."""


@pytest.mark.parametrize(
    ("before", "after"),
    [(SRUN, ()), (DEALT_OUT, ()), ((), ("--engine", "slurm"))],
    ids=["srun", "cyclic", "--engine slurm"],
)
def test_a_job_trains_on_both(before: tuple[str, ...], after: tuple[str, ...], mark: str) -> None:
    train = ("train", "work.py:small", "--strategy", "dp=4", "--steps", "3", "--out", "out", "--quiet", "--json")
    output, errors = on_first(*before, *SHARDWISE, *train, *after)
    assert json.loads(output)["steps"] == 3
    assert sorted(line for line in errors.splitlines() if line.startswith("rank ")) == [
        f"rank {rank} of 4, {rank % 2} of 2, by slurm" for rank in range(4)
    ]
    assert errors.count("ranks are numbered anew") == (before is DEALT_OUT)
    await_no_process(mark)


def test_ranks_learn_their_switch() -> None:
    ask = "from shardwise.launch.context import rank_context; print(rank_context().switch)"
    output, _ = on_first(*SRUN, sys.executable, "-c", ask)
    assert sorted(output.split()) == [f"root.at-{hosts.name(host)}" for host in (0, 0, 1, 1)]


MEASURE = """
    from unittest import mock

    import torch

    from shardwise.cluster.measure.kernel_cases import all_cases
    from shardwise.cluster.toml_writer import write_cluster
    from shardwise.run.calibration import calibrate
    from shardwise.run.calibration.trials import Footprint, FootprintTrial, small
    from shardwise.strategy import Strategy

    def few(dtype):
        cases = list(all_cases(dtype))
        return [*cases[:3], *cases[::40], *cases[-4:]]

    effort = calibrate.Effort(0.001, 0.004, 0.05, 0.0, (torch.float32,), few)
    nothing = Footprint({}, small(4), FootprintTrial(Strategy(dp=4), 0.0), 0, {})
    sizes = mock.patch("shardwise.cluster.measure.collectives.SIZES", (1024, 1024**2))
    trusted = mock.patch.object(calibrate, "trusted", lambda found: found)  # its kernels, while other tests run
    with sizes, trusted, mock.patch.object(calibrate, "footprint", lambda seconds: nothing):
        found = calibrate.calibrate(effort=effort, quiet=True)
    if found is not None:
        write_cluster(found, "nodes.toml")
"""
"""Program that measures as `shardwise calibrate` does, but without its trainings, and few sizes of it."""


def test_a_calibration_sees_the_slow_link(folder: Path) -> None:
    (folder / "measure.py").write_text(textwrap.dedent(MEASURE))
    on_first(*SRUN, sys.executable, "measure.py")
    measured = read_cluster(str(folder / "nodes.toml"))
    assert [level.span for level in measured.levels] == [2, 4]
    within, between = measured.levels
    assert between.bandwidth < 2 * RATE / 8
    assert within.bandwidth > 4 * between.bandwidth
