"""The API as scripts use it: plain files without a `__main__` guard, with the model defined in them."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import warm

MODEL = """
    import json, os, sys
    import torch
    from torch import nn
    import shardwise

    generator = torch.Generator().manual_seed(1)
    data, labels = torch.randn(28, 4, generator=generator), torch.arange(28) % 3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.output = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.output(torch.relu(self.hidden(x)))
"""


def run_script(folder: Path, body: str, workers: int = 0) -> list[Any]:
    """Runs MODEL and `body` as a script, under torchrun with `workers`; the JSON documents that it wrote."""
    (folder / "script.py").write_text(textwrap.dedent(MODEL) + textwrap.dedent(body))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(workers)] if workers else []
    line = [sys.executable, *launcher, "script.py"]
    done = warm.run(line, cwd=folder, timeout=400)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines() if text]


def test_train_parallel(folder: Path) -> None:
    (result,) = run_script(
        folder,
        """
        model = Net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = shardwise.train_parallel(
            model, (data, labels), nn.CrossEntropyLoss(), batch_size=8, workers=2, strategy="dp=2", epochs=2,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), quiet=True,
            evaluation=(data, labels), metric="accuracy",
        )
        # the same by hand
        from shardwise.workload.reading.order import epoch_order
        order = [epoch_order(28, 0, epoch) for epoch in range(2)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        untouched = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        for batch in (part for epoch in order for part in torch.tensor(epoch).split(8)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[batch]), labels[batch]).backward()
            optimizer.step()
        mine, theirs = model.state_dict(), trained.model.state_dict()
        accuracy = (trained.model(data).argmax(1) == labels).float().mean().item()
        print(json.dumps({
            "untouched": untouched, "kind": type(trained.model).__name__, "run": trained.run,
            "difference": max((mine[name] - theirs[name]).abs().max().item() for name in mine),
            "accuracy": [accuracy, trained.metrics["accuracy"]],
            "history": [step["step"] for step in trained.history],
            "workers": trained.summary["workers"],
        }))
        """,
    )
    assert result["untouched"]
    assert (result["kind"], result["run"], result["workers"]) == ("Net", None, 2)
    assert result["difference"] < 1e-6
    assert abs(result["accuracy"][0] - result["accuracy"][1]) < 1e-6
    assert result["history"] == list(range(1, 9))


def test_parallelize_and_train_parallel_under_torchrun(folder: Path) -> None:
    results = run_script(
        folder,
        """
        from work import small
        program = shardwise.parallelize(small, "dp=2")
        batch = (data[:8], labels[:8])
        losses = [program.step(batch).item() for _ in range(3)]
        trained = shardwise.train_parallel(
            Net, (data, labels), nn.CrossEntropyLoss(), batch_size=8, steps=2, quiet=True
        )
        total = sum(tensor.double().sum().item() for tensor in trained.model.state_dict().values())
        # one write per process: lines of several must not mix
        sys.stdout.write(json.dumps([losses, trained.metrics, trained.history, total]) + "\\n")
        """,
        workers=2,
    )
    assert len(results) == 2
    assert results[0] == results[1]
    losses, metrics, history, _ = results[0]
    assert losses[2] < losses[1] < losses[0]
    assert metrics == {}
    assert [step["step"] for step in history] == [1, 2]


def test_parallelize_in_one_process(folder: Path) -> None:
    (losses, refusal) = run_script(
        folder,
        """
        from work import small
        program = shardwise.parallelize(small(), "single")
        print(json.dumps([program.step((data, labels)).item() for _ in range(3)]))
        try:
            shardwise.parallelize(small, "dp=2")
        except shardwise.ShardwiseError as error:
            print(json.dumps(str(error)))
        """,
    )
    assert losses[2] < losses[1] < losses[0]
    assert refusal == "strategy dp=2 needs 2 workers, this is one process: start it with torchrun --nproc-per-node 2"
