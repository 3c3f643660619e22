"""`--engine` starts as many workers as it should, with the right arguments, and refuses wrong requests first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import shardwise
from shardwise.cluster.find import find_cluster
from shardwise.commands import launching
from shardwise.commands.launching import allocated_workers, passed_on, run_under
from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch.engines.slurm import SlurmLauncher
from shardwise.launch.engines.torchrun import TorchrunLauncher
from shardwise.launch.launcher import LaunchRequest


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LaunchRequest]:
    """The jobs that would have been started."""
    started: list[LaunchRequest] = []

    def launch(_: object, request: LaunchRequest) -> int:
        started.append(request)
        return 0

    monkeypatch.setattr(launching, "launch", launch)
    return started


def under(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], **options: Any) -> int | str:
    monkeypatch.setattr(launching, "environment", lambda: environment)
    return run_under("slurm", ("train", "image"), **({"strategy": None, "workers": None} | options))


def test_workers_are_those_of_the_strategy_or_of_the_allocation(
    asked: list[LaunchRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
    under(monkeypatch, {}, strategy="dp=2,tp=2")
    under(monkeypatch, {}, strategy="auto", workers=3)
    under(monkeypatch, allocation)
    assert [each.workers for each in asked] == [4, 3, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how many workers to start"),
        ({"strategy": "dp=2", "workers": 3}, "needs 2 workers, there are 3"),
        ({"workers": 0}, "workers=0"),
        ({"workers": 2, "hosts": "a,,b"}, "'' is no host"),
        ({"workers": 2, "hosts": "a,-oProxyCommand=x"}, "'-oProxyCommand=x' is no host"),
    ],
)
def test_a_wrong_request_is_refused(
    asked: list[LaunchRequest], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        under(monkeypatch, {}, **options)
    assert asked == []


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[LaunchRequest]) -> list[int]:
    """The exit status of jobs that leave a summary in their folder."""
    statuses = [0]

    def launch(_: object, request: LaunchRequest) -> int:
        asked.append(request)
        folder = Path(request.arguments[request.arguments.index("--out") + 1])
        if not statuses[0]:
            (folder / "summary.json").write_text('{"loss": 0.5}')
        return statuses[0]

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "environment", dict)
    monkeypatch.chdir(tmp_path)
    return statuses


@pytest.mark.usefixtures("status")
def test_training_from_a_program_asks_for_what_the_program_says(asked: list[LaunchRequest], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = shardwise.train(
        "image",
        engine="slurm",
        hosts="n1,n2",
        out="out",
        resume="auto",
        strategy=shardwise.Strategy.parse("dp=2"),
        steps=3,
        seed=0,
        grace=2.5,
        settings={"layers": 2, "name": "a b", "flag": False},
        proof=False,
        quiet=True,
        track=["tensorboard", "mlflow"],
    )
    assert done == {"loss": 0.5}
    (job,) = asked
    assert (job.workers, job.hosts, job.grace) == (2, ("n1", "n2"), 2.5)
    assert job.arguments == (
        *("train", "image", "--out", "out", "--strategy", "dp=2", "--steps", "3", "--seed", "0"),
        *("--checkpoint-every", "0", "--keep", "3", "--grace", "2.5", "--quiet", "--on-nan", "stop"),
        *("--track", "tensorboard,mlflow", "--set", "layers=2", "--set", "name=a b", "--set", "flag=False"),
        *("--no-proof", "--resume", "auto"),
    )


def of_this_file() -> shardwise.Workload:
    raise NotImplementedError


def test_workers_load_a_function_by_its_file(asked: list[LaunchRequest], status: list[int], tmp_path: Path) -> None:
    shardwise.train(of_this_file, engine="slurm", workers=2, allow=("lossy", "async"))
    name, words = asked[0].arguments[1], asked[0].arguments
    assert name == f"{Path(__file__).resolve()}:of_this_file"
    assert words[words.index("--out") + 1] == "runs/of_this_file-slurm-1"
    assert words[-4:] == ("--allow", "lossy", "--allow", "async")
    status[0] = 1
    with pytest.raises(
        ShardwiseError, match="engine slurm: the job ended with exit status 1; its error is on standard"
    ):
        shardwise.train(of_this_file, engine="slurm", workers=2)
    status[0] = 2
    with pytest.raises(RequestError, match="exit status 2"):
        shardwise.train(of_this_file, engine="slurm", workers=2)
    assert [each.name for each in (tmp_path / "runs").iterdir()] == ["of_this_file-slurm-1"]


@pytest.mark.parametrize(
    ("workload", "options", "message"),
    [
        (lambda: None, {}, "not an object or a function within another"),
        ("image", {"settings": {"data": [1]}}, "settings: data=\\[1\\]: workers of an engine get numbers and text"),
        ("image", {"resume": True}, "resume=True with engine slurm: give out too"),
        ("image", {"engine": "slrum"}, "did you mean 'slurm'"),
    ],
)
@pytest.mark.usefixtures("status")
def test_what_an_engine_cannot_train_is_refused(
    asked: list[LaunchRequest], workload: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        shardwise.train(workload, **{"engine": "slurm", "workers": 2, **options})
    assert asked == []


def test_an_unknown_engine_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'slurm'"):
        run_under("slrum", (), strategy="dp=2", workers=None)


def test_workers_do_not_get_the_options_of_the_engine() -> None:
    given = ("train", "image", "--engine", "mpi", "--strategy", "dp=2", "--hosts=a,b", "--hosts", "c", "--dry-run")
    assert passed_on(given) == ("train", "image", "--strategy", "dp=2")


def test_torchrun_starts_no_other_hosts() -> None:
    with pytest.raises(RequestError, match="engine torchrun takes no --hosts"):
        TorchrunLauncher().check(LaunchRequest(arguments=(), workers=2, hosts=("a",)))


def test_a_batch_script_resumes_and_quotes() -> None:
    request = LaunchRequest(arguments=("train", "my work.py:small"), workers=2, hosts=("n1", "n2"), grace=20)
    script = SlurmLauncher().script(request)
    assert script.startswith(
        "#!/bin/bash\n#SBATCH --job-name=shardwise\n#SBATCH --ntasks=2\n#SBATCH --nodelist=n1,n2\n"
    )
    assert "#SBATCH --requeue\n" in script
    assert "train 'my work.py:small' --resume auto --out \"runs/slurm-$SLURM_JOB_ID\"\n" in script


def test_a_batch_script_keeps_the_folder_of_its_user() -> None:
    request = LaunchRequest(arguments=("train", "image", "--out=here", "--resume"), workers=2)
    assert SlurmLauncher().script(request).endswith("-m shardwise train image --out=here --resume\n")


def planned(
    monkeypatch: pytest.MonkeyPatch, per_node: str, tasks: int, cluster: str, workers: int | None = None
) -> int:
    around = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks), "SLURM_TASKS_PER_NODE": per_node}
    monkeypatch.setattr(launching, "environment", lambda: around)
    return allocated_workers("slurm", workers, find_cluster(cluster))


@pytest.mark.parametrize(("per_node", "tasks"), [("8(x2)", 16), ("8", 8), ("5", 5), ("8,3", 11)])
def test_a_plan_is_for_the_tasks_of_the_allocation(monkeypatch: pytest.MonkeyPatch, per_node: str, tasks: int) -> None:
    assert planned(monkeypatch, per_node, tasks, "h100x16") == tasks


@pytest.mark.parametrize(
    ("per_node", "tasks", "message"),
    [
        ("4(x4)", 16, r"has 4 \+ 4 \+ 4 \+ 4 tasks on its nodes, h100x16 has 8 \+ 8 devices"),
        ("16", 16, "has 16 tasks on its nodes, h100x16 has 8 devices"),
        ("8(x3)", 24, r"has 8 \+ 8 \+ 8 tasks on its nodes, h100x16 has 8 \+ 8 devices"),
        ("8", 16, "has no known number of tasks"),
    ],
)
def test_a_plan_for_other_nodes_than_the_allocations_is_refused(
    monkeypatch: pytest.MonkeyPatch, per_node: str, tasks: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        planned(monkeypatch, per_node, tasks, "h100x16")


def test_a_plan_outside_an_allocation_or_for_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="workers=4: the allocation of slurm was made for 8 tasks"):
        planned(monkeypatch, "8", 8, "h100x8", workers=4)
    monkeypatch.setattr(launching, "environment", dict)
    with pytest.raises(RequestError, match="engine slurm: this command is in no allocation"):
        allocated_workers("slurm", None, find_cluster("h100x8"))
