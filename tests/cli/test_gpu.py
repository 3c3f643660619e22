"""The command on one GPU."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch
from command import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WORKLOAD = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    from shardwise import Workload

    def gpu(fail: str = "") -> Workload:
        data = TensorDataset(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3)
        calls = []

        def loss(output, batch):
            calls.append(0)
            if len(calls) == 3 and fail == "stuck":
                torch.cuda._sleep(10**14)
            if len(calls) == 3 and fail == "memory":
                torch.empty(2**43, dtype=torch.uint8, device=output.device)
            return F.cross_entropy(output, batch[1])

        return Workload(
            name="gpu",
            model=lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)),
            dataset=data,
            inputs=lambda batch: batch[0],
            loss=loss,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            batch_size=16,
        )
"""


@pytest.fixture(autouse=True)
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gpu.py in the working directory."""
    (folder / "gpu.py").write_text(textwrap.dedent(WORKLOAD))
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("recipe", ["image", "language", "medical"])
def test_recipes(recipe: str, precision: str, run: Run) -> None:
    done = run("train", recipe, "--strategy", f"single,precision={precision}", "--steps", "8", "--json", "--quiet")
    summary = json.loads(done.stdout)
    assert summary["steps"] == 8
    assert 0 < summary["loss"] < 10
    assert 0 < summary["step_seconds"] < 10
    assert 0 < summary["memory_bytes"] < torch.cuda.get_device_properties(0).total_memory


def test_a_checkpoint_moves_from_the_cpu_to_the_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("train", "gpu.py:gpu", "--strategy", "single", "--json", "--quiet")
    whole = json.loads(run(*options, "--steps", "8", "--out", "whole").stdout)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run(*options, "--steps", "4", "--out", "part")
    resumed = json.loads(run(*options, "--steps", "8", "--out", "part", "--resume", "auto").stdout)
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    run("export", "part", "part.safetensors")


def test_strategies_of_one_worker_are_equal(run: Run) -> None:
    many = ("single,recompute=full", "single,recompute=selective", "single,microbatches=4")
    done = run("verify", "language", *(word for each in many for word in ("--strategy", each)), "--json", "--quiet")
    assert all(row["passed"] for row in json.loads(done.stdout)["results"])


def test_more_workers_than_gpus_compute_on_the_cpu(run: Run) -> None:
    workers = torch.cuda.device_count() + 1
    done = run("train", "gpu.py:gpu", "--strategy", f"dp={workers}", "--steps", "3", "--json", "--quiet")
    assert f"GPU for {workers} workers: they compute on the CPU" in done.stderr
    assert json.loads(done.stdout)["steps"] == 3


def test_a_launcher_of_more_workers_than_gpus_is_refused(run: Run) -> None:
    workers = torch.cuda.device_count() + 1
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}")
    done = run("train", "gpu.py:gpu", "--strategy", f"dp={workers}", "--steps", "3", launcher=launcher, status=1)
    assert f"{workers} workers were started on a host with" in done.stderr


def test_a_kernel_that_never_ends_ends_the_run(run: Run) -> None:
    options = ("--set", "fail=stuck", "--steps", "9", "--hang-timeout", "5", "--quiet")
    done = run("train", "gpu.py:gpu", "--strategy", "single", *options, status=1)
    assert done.stderr.splitlines()[-1].startswith("shardwise: worker 0")


def test_a_gpu_that_is_full_is_told(run: Run) -> None:
    options = ("--set", "fail=memory", "--steps", "9", "--quiet")
    done = run("train", "gpu.py:gpu", "--strategy", "single", *options, status=1)
    assert done.stderr.splitlines()[-1].startswith("shardwise: worker 0 ran out of memory")
