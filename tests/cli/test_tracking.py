"""Trackers of real runs, offline: what each gets, that a resume goes on with it, and that nothing is sent."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from command import Run, command, processes_with

WORKLOAD = ("train", "work.py:small", "--quiet", "--checkpoint-every", "2")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The proxy of all HTTP clients that tests start, which no client may ask; and no account anywhere."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        for name in ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "DO_NOT_TRACK"):  # there MLflow tells nobody
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", "/dev/null")
        yield listener
        with pytest.raises(BlockingIOError):
            listener.accept()


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def mlflow_values(store: Path, name: str) -> list[tuple[int, float]]:
    """Values in a file store of MLflow, which must hold one run alone: lines of `time value step`."""
    (path,) = store.glob(f"*/*/metrics/{name}")
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(int(step), float(value)) for _, value, step in lines]


def wandb_bytes(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(run.glob("wandb/offline-run-*/*.wandb")))


def test_mlflow(run: Run, folder: Path, nobody: socket.socket) -> None:
    pytest.importorskip("mlflow")
    options = (*WORKLOAD, "--strategy", "dp=2", "--out", "out", "--steps")
    done = run(*options, "4", "--track", "mlflow")
    assert done.stderr == ""
    assert not (folder / "out/tensorboard").exists()
    assert mlflow_values(folder / "out/mlflow", "loss") == list(losses(folder / "out").items())
    assert [step for step, _ in mlflow_values(folder / "out/mlflow", "evaluation/accuracy")] == [4]
    (params,) = (folder / "out/mlflow").glob("*/*/params")
    assert (params / "strategy").read_text() == "dp=2"
    run(*options, "6", "--resume")  # with the tracker of the run
    assert mlflow_values(folder / "out/mlflow", "loss") == list(losses(folder / "out").items())
    (meta,) = (folder / "out/mlflow").glob("*/*/meta.yaml")
    assert "status: 3\n" in meta.read_text()  # FINISHED
    run(*options, "7", "--resume", "--track", "none")
    assert len(mlflow_values(folder / "out/mlflow", "loss")) == 6


def test_wandb(run: Run, folder: Path, nobody: socket.socket, mark: str) -> None:
    pytest.importorskip("wandb")
    options = (*WORKLOAD, "--strategy", "dp=2", "--out", "out", "--steps")
    done = run(*options, "4", "--track", "wandb,tensorboard")
    assert done.stderr == ""
    assert processes_with(mark) == []  # wandb has a process of its own
    assert list((folder / "out/tensorboard").iterdir())
    identity = json.loads((folder / "out/wandb.json").read_text())["id"]
    run(*options, "6", "--resume")
    content = wandb_bytes(folder / "out")
    for loss in losses(folder / "out").values():
        assert json.dumps(loss).encode() in content
    assert b"evaluation/accuracy" in content
    runs = sorted((folder / "out/wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in runs] == [identity, identity]


def test_tracker_that_fails(run: Run, folder: Path, nobody: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    (folder / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "file" / "store").as_uri())
    done = run(*WORKLOAD, "--steps", "3", "--track", "mlflow", "--out", "out")
    assert done.stderr.startswith("MLflow failed, the run goes on without it: ")
    assert done.stderr.count("\n") == 1
    assert len(losses(folder / "out")) == 3
    state = json.loads(run("watch", "out", "--once", "--json", "--quiet").stdout)
    assert state["warnings"][0]["text"] == done.stderr.strip()


def test_one_run_under_torchrun(run: Run, folder: Path, nobody: socket.socket) -> None:
    pytest.importorskip("mlflow")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    run(*WORKLOAD, "--steps", "3", "--out", "out", "--track", "mlflow", launcher=launcher)
    assert mlflow_values(folder / "out/mlflow", "loss") == list(losses(folder / "out").items())
    state = json.loads(run("watch", "out", "--once", "--json", "--quiet").stdout)
    assert (state["state"], state["step"]) == ("finished", 3)


def test_one_that_is_not_installed_is_refused(folder: Path) -> None:
    (folder / "without.py").write_text(
        "import sys\n"
        "from shardwise import cli\n"
        "from shardwise.run.training.tracking import choice\n"
        "choice.find_spec = lambda name: None\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    line = [*command()[:1], "without.py", *WORKLOAD, "--track", "mlflow", "--out", "out"]
    done = warm.run(line, cwd=folder, timeout=400, stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "shardwise: track=mlflow: MLflow is not installed: pip install 'shardwise[mlflow]'\n"
    assert not (folder / "out").exists()
