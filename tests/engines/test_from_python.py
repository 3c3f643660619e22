"""`shardwise.train(engine=...)` from a program, which has joined a cluster of Ray or not."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import shardwise

PROGRAM = """
    import json, sys
    import ray
    import shardwise
    from work import small

    ray.init(address="local", num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)

    @ray.remote
    def doubled(number):
        return 2 * number

    def train(**options):
        return shardwise.train(small, quiet=True, steps=3, engine="ray", **options)

    before = ray.get(doubled.remote(2))
    done = [train(strategy="dp=2", out="first", settings={"samples": 48}), train(workers=2, strategy="fsdp=2")]
    for wrong in ({"strategy": "dp=9"}, {"strategy": "dp=2", "out": "first"}, {"strategy": "dp=2", "resume": True}):
        try:
            train(**wrong)
        except shardwise.ShardwiseError as error:
            done.append(f"{type(error).__name__}: {error}")
    with open("done.json", "w") as file:
        json.dump([before, ray.get(doubled.remote(3)), ray.is_initialized(), *done], file)
"""


def test_inside_a_cluster_that_the_program_has_joined(folder: Path) -> None:
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    ended = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    before, after, joined, first, second, *refused = json.loads((folder / "done.json").read_text())
    assert (before, after, joined) == (4, 6, True)
    local = shardwise.train(
        "work.py:small", strategy="dp=2", steps=3, quiet=True, settings={"samples": 48}, out="local"
    )
    assert first.keys() == local.keys()
    assert (first["workers"], first["steps"], first["run"]) == (2, 3, "first")
    assert first["loss"] == pytest.approx(local["loss"], rel=1e-6)
    assert second["run"] == "runs/small-ray-1"
    assert refused[0] == (
        "RequestError: engine ray: the strategy needs 9 workers, the cluster has 3 CPUs: use --workers 3, or add nodes "
        "(ray start)"
    )
    assert refused[1].startswith("RequestError: engine ray: the job ended with exit status 2")
    assert "first" in ended.stderr
    assert refused[2] == "RequestError: resume=True with engine ray: give out too, the folder of the run"
    assert list((folder / "runs").iterdir()) == [folder / "runs" / "small-ray-1"]


@pytest.mark.parametrize("engine", ["torchrun", "mpi"])
def test_from_a_program(folder: Path, engine: str) -> None:
    done = shardwise.train("work.py:small", strategy="dp=2", steps=3, quiet=True, out=engine, engine=engine)
    assert (done["workers"], done["steps"], done["run"]) == (2, 3, engine)
