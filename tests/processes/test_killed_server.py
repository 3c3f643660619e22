"""Parameter servers that are killed lose nothing that they acknowledged, and end with the process that started them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardwise.launch.beside import Beside, listen
from shardwise.parallel.servers.client import ServerGroup
from shardwise.parallel.servers.frames import Kind
from shardwise.parallel.servers.rows import contribution
from shardwise.parallel.servers.server import ServerSetup, run_server
from shardwise.workload.workload import Workload

TOKEN = "a token of this test alone"
SHAPES = {"table": (64, 8), "weight": (32, 16)}
OWNERS = {"table": 0, "weight": 1}
WORKERS, STEPS = 2, 40


def work() -> Workload:
    return Workload(
        name="killed",
        model=nn.Identity,
        dataset=(),
        inputs=lambda batch: batch,
        loss=lambda output, batch: output,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        batch_size=4,
    )


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def started(folder: Path, staleness: int | None = 0) -> list[Beside]:
    trained = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in SHAPES.items()}
    return [
        Beside(
            run_server,
            (
                ServerSetup(
                    workload=work(),
                    trained=trained,
                    names=(name,),
                    workers=WORKERS,
                    token=TOKEN,
                    staleness=staleness,
                    folder=str(folder / name),
                ),
            ),
            listen("127.0.0.1"),
            str(folder / name),
        )
        for name in SHAPES
    ]


def trained_on(servers: list[Beside], *, kills: random.Random | None = None) -> dict[str, Tensor]:
    """Train with two workers, in threads, while servers are killed at drawn moments; return the parameters."""
    addresses = [each.address for each in servers]
    groups = [ServerGroup(addresses, TOKEN, rank, OWNERS) for rank in range(WORKERS)]
    groups[0].ask(Kind.WRITE, lambda _: {}, {f"p/{name}": torch.ones(shape) for name, shape in SHAPES.items()})
    over = threading.Event()

    def run(rank: int) -> None:
        for step in range(STEPS):
            tensors, sparse = contribution(gradients(rank, step))
            groups[rank].push({"weight": 1.0, "losses": [1.0], "sparse": sparse}, tensors, together=True)
            groups[rank].apply(applied=True)
            time.sleep(0.02)

    def kill() -> None:
        assert kills is not None
        for _ in range(3):
            if over.wait(kills.uniform(0.0, 0.5)):
                return
            os.kill(kills.choice(servers).pid, signal.SIGKILL)
            over.wait(kills.uniform(0.0, 3.0))  # perhaps while it starts again

    with ThreadPoolExecutor(WORKERS + 1) as pool:
        killing = None if kills is None else pool.submit(kill)
        for worker in [pool.submit(run, rank) for rank in range(WORKERS)]:
            worker.result(timeout=300)
        over.set()
        if killing is not None:
            killing.result(timeout=60)
    answers = groups[0].ask(Kind.READ, lambda _: {"what": "parameters"})
    assert all(answer.facts["updates"] == STEPS for answer in answers)
    for each in groups:
        each.close()
    return {name: tensor for answer in answers for name, tensor in answer.tensors.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    servers = started(tmp_path_factory.mktemp("quiet"))
    found = trained_on(servers)
    for each in servers:
        each.close()
        assert each.starts == 1
    return found


@pytest.mark.parametrize("seed", range(2))
def test_servers_that_are_killed_lose_nothing_acknowledged(
    tmp_path: Path, expected: dict[str, Tensor], seed: int
) -> None:
    servers = started(tmp_path)
    found = trained_on(servers, kills=random.Random(seed))
    for each in servers:
        each.close()
    assert sum(each.starts for each in servers) > len(servers), "no server was killed"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_server_ends_with_the_process_that_started_it_and_leaves_no_folder(tmp_path: Path) -> None:
    program = f"""
        import sys, time
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from pathlib import Path
        from test_killed_server import started
        print(*(each.pid for each in started(Path({str(tmp_path)!r}))), flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        assert len(pids) == len(SHAPES)
        time.sleep(0.5)
        parent.kill()
    end = time.monotonic() + 30
    while any(Path("/proc", str(pid)).exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert not list(tmp_path.iterdir())
