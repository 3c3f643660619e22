"""A training step on one device written by hand, and Shardwise's program for the same workload in turns with it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from shardwise import Strategy, Workload

BLOCK = 5
"""Steps that are timed together, so that the host may run ahead as it does in a training."""


def in_turns(workload: Workload, strategy: Strategy, rounds: int) -> dict[str, Any]:
    """Peak memory of the step by hand, then seconds of a step of both in each round. A worker of its own runs it."""
    from torch.utils.data import default_collate

    from shardwise.parallel.mesh import default_device
    from shardwise.parallel.program import Program
    from shardwise.run.training.process_memory import peak_memory
    from shardwise.workload.data import first_samples
    from shardwise.workload.reading.loader import share_of

    device = default_device()
    samples = first_samples(workload.dataset, workload.batch_size)
    assert samples is not None
    batch = (workload.collate or default_collate)(samples)
    hand = by_hand(workload, strategy, batch, device)
    hand_loss = [hand() for _ in range(BLOCK)][-1]
    hand_bytes = peak_memory(device)
    program = Program.build(workload, strategy)
    share = share_of(batch, program.loader())
    program.ask_before_update(lambda loss, square, search: True)  # as in a training: the loss is read before the update
    loss = [float(program.step_share(share)) for _ in range(BLOCK)][-1]
    steps: list[Callable[[], Any]] = [lambda: program.step_share(share), hand]
    seconds = []
    for number in range(rounds):
        order = range(2) if number % 2 == 0 else (1, 0)
        took = {which: _block(steps[which], device) for which in order}
        seconds.append([took[0], took[1]])
    return {"hand_bytes": hand_bytes, "ours_and_hand_seconds": seconds, "loss": loss, "hand_loss": hand_loss}


def by_hand(workload: Workload, strategy: Strategy, batch: Any, device: torch.device) -> Callable[[], float]:
    """A plain loop's step as tutorials write it: it reads its loss, and does nothing that a step does not need."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from shardwise.workload.pytree import to_device
    from shardwise.workload.workload import call_model

    torch.manual_seed(workload.seed)
    model = workload.model().to(device)
    optimizer = workload.optimizer(model.parameters())
    schedule = workload.schedule(optimizer) if workload.schedule is not None else None
    half = strategy.in_bf16(workload.precision)
    if strategy.recomputes:
        for block in itertools.chain.from_iterable(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
            block.forward = _recomputed(block.forward, checkpoint)

    def step() -> float:
        data = to_device(batch, device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss: torch.Tensor = workload.loss(call_model(model, workload.inputs(data)), data)
        loss.backward()  # type: ignore[no-untyped-call]
        if workload.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss.item()

    return step


def _recomputed(forward: Callable[..., Any], checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def _block(step: Callable[[], Any], device: torch.device) -> float:
    step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(BLOCK):
        step()
    _wait(device)
    return (time.perf_counter() - start) / BLOCK


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
