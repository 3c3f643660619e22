"""A Horovod script runs by changing its import: alone, under torchrun, and under Shardwise's own launcher."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import warm

SCRIPT = """
    import json, os, sys
    import torch
    from torch import nn
    from torch.nn import functional as F
    import shardwise.compat.horovod as hvd

    hvd.init()
    torch.manual_seed(hvd.rank())
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    sampler = torch.utils.data.distributed.DistributedSampler(
        torch.utils.data.TensorDataset(x, y), num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False
    )
    loader = torch.utils.data.DataLoader(sampler.dataset, batch_size=24 // hvd.size(), sampler=sampler)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 , momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    for epoch in range(3):
        for data, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(data), target).backward()
            optimizer.step()
    loss = hvd.allreduce(F.cross_entropy(model(x), y).detach(), name="loss")
    if hvd.rank() == 0:
        print(json.dumps({"size": hvd.size(), "loss": float(loss), "arguments": sys.argv[1:]}))
"""

ELASTIC = """
    import json, os, signal
    import torch
    import shardwise.compat.horovod as hvd

    hvd.init()
    model = torch.nn.Linear(2, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1))
    sampler = hvd.elastic.ElasticSampler(range(16), shuffle=False)
    starts = []

    @hvd.elastic.run
    def train(state):
        starts.append(state.batch)
        for batch in range(state.batch, 6):
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if batch == 3 and first and hvd.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            model(torch.full((1, 2), float(batch))).sum().backward()
            optimizer.step()
            state.batch = batch + 1
            sampler.record_batch(batch, 1)
            state.commit()
        return state.batch

    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, batch=0)
    batch = train(state)
    found = optimizer.state_dict()["state"][0]["step"]
    if hvd.rank() == 0:
        print(json.dumps({"batch": batch, "starts": starts, "steps": float(found), "processed": sampler.processed_num}))
"""


def told(folder: Path, script: str, *launcher: str, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    (folder / "script.py").write_text(textwrap.dedent(script))
    line = [sys.executable, *launcher, "script.py", *arguments]
    if "shardwise.compat.horovod" in launcher:
        # what local workers print does not go through the pipes of a warm process
        done = subprocess.run(line, cwd=folder, timeout=300, capture_output=True, text=True, check=False)
    else:
        done = warm.run(line, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    (document,) = [each for each in done.stdout.splitlines() if each.startswith("{")]
    result: dict[str, Any] = json.loads(document)
    return result


def test_a_script_trains_alike_under_every_launcher(folder: Path) -> None:
    alone = told(folder, SCRIPT, arguments=("a", "-b"))
    assert (alone["size"], alone["arguments"]) == (1, ["a", "-b"])
    for launcher in (
        ("-m", "torch.distributed.run", "--nproc-per-node", "2"),
        ("-m", "shardwise.compat.horovod", "-np", "2"),
    ):
        together = told(folder, SCRIPT, *launcher, arguments=("a", "-b"))
        assert (together["size"], together["arguments"]) == (2, ["a", "-b"])
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_an_elastic_training_goes_on_from_its_last_commit(folder: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")
    result = told(folder, ELASTIC, *launcher)
    assert result == {"batch": 6, "starts": [3], "steps": 6.0, "processed": 12}


def test_a_script_that_fails_is_told_in_one_line(folder: Path) -> None:
    (folder / "script.py").write_text("import sys\nsys.exit(3)")
    line = [sys.executable, "-m", "shardwise.compat.horovod", "-np", "2"]
    done: subprocess.CompletedProcess[str] = warm.run([*line, "script.py"], cwd=folder, timeout=100)
    assert done.returncode == 1
    assert done.stderr.count("script.py ended with exit status 3") == 1
    done = warm.run([*line, "none.py"], cwd=folder, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "shardwise: there is no script 'none.py': give the path of a Python file\n"


def test_functions_run_on_local_workers(folder: Path) -> None:
    script = """
        import json
        import shardwise.compat.horovod as hvd

        def work(factor):
            hvd.init()
            return hvd.rank() * factor

        print(json.dumps({"results": hvd.run(work, args=(3,), np=2)}))
    """
    assert told(folder, script) == {"results": [0, 3]}
