"""Plain training loops as users write them by hand, to compare Shardwise with: torch's DDP and FSDP2, nothing else.

They train a workload on the samples that Shardwise gives each replica, from the same weights, and report the global
loss of each step; the workers sum up the losses of many steps in one message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.launch import gate, watch
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.build_model import build_model
from shardwise.run.training.job import Job
from shardwise.run.training.process_memory import peak_memory
from shardwise.run.training.result import Step, Trained
from shardwise.strategy import Strategy
from shardwise.workload.data import Share
from shardwise.workload.pytree import map_tensors
from shardwise.workload.reading.loader import Loader
from shardwise.workload.workload import Workload

NAMES = {"dp": "DDP by hand", "fsdp": "FSDP2 by hand"}
"""Axis of a strategy -> name of the plain loop that does the same."""

_OTHERS = ("step", "weight", "average", "after_step", "stop", "groups")
"""Fields of a workload that make its step more than forward, loss, backward and update of a plain loop."""


def refusal(workload: Workload, strategy: Strategy) -> str | None:
    """Return why no plain loop can do what a strategy does with a workload. Returns None if one can."""
    alone = Strategy(dp=strategy.dp) if strategy.dp > 1 else Strategy(fsdp=strategy.fsdp)
    if strategy != alone or strategy.workers == 1:
        return "only dp=K and fsdp=K without options have a loop of torch's own"
    fields = [name for name in _OTHERS if getattr(workload, name)]
    if workload.precision != "float32":
        fields.append("precision")
    if workload.schedule is not None and workload.schedule_every == "metric":
        fields.append("schedule_every")
    if fields:
        return f"the step of {workload.name!r} is more than a plain loop does: {', '.join(fields)}"
    return None


def train_by_hand(job: Job) -> Trained:
    """Train with torch's DDP or FSDP2 alone, under the strategy of `job`; in each of its workers."""
    with watch.watching(watch.limits(job.options.hang_timeout, job.forecast.seconds)):
        return _Loop(job).run()


class _Loop:
    """The loop on one worker."""

    def __init__(self, job: Job) -> None:
        self._job, self._strategy = job, job.strategy
        self._workload = workload = job.source.load()
        mesh = Mesh.build(job.strategy)
        self._device, self._rank = mesh.device, mesh.rank
        model = build_model(workload, mesh)
        self._model = _wrapped(model, job.strategy)
        self._optimizer = workload.optimizer(self._model.parameters())
        self._schedule = None if workload.schedule is None else workload.schedule(self._optimizer)
        self._loader = Loader(
            dataset=workload.dataset,
            batch_size=workload.batch_size,
            collate=workload.collate,
            seed=workload.seed,
            loading=workload.loading,
            replica=mesh.replica,
            parts=job.strategy.parts,
        )
        self._losses: list[Tensor] = []
        self._pending: list[tuple[int, int, float | None]] = []
        self._steps: list[Step] = []
        self._told = 0
        self._mark = time.perf_counter()

    def run(self) -> Trained:
        total = self._job.options.total(self._loader.batches)
        done = 0
        for epoch, share in self._shares():
            if self._job.slice_steps and done % self._job.slice_steps == 0:
                self._wait_for_turn()
            self._losses.append(self._step(share))
            self._synchronize()
            now = time.perf_counter()
            self._pending.append((epoch, share.samples, now - self._mark))
            self._mark, done = now, done + 1
            watch.beat()
            if total is not None and done >= total:
                break
        self._reckon()
        return Trained({"memory_bytes": self._peak()}, tuple(self._steps), {})

    def _shares(self) -> Iterator[tuple[int, Share]]:
        epochs = self._job.options.epochs
        for epoch in count() if epochs is None else range(epochs):
            yield from ((epoch, share) for share in self._loader.shares(epoch))
            if self._schedule is not None and self._workload.schedule_every == "epoch":
                self._schedule.step()

    def _step(self, share: Share) -> Tensor:
        """Take a step; return this replica's part of the mean loss."""
        (microbatch,) = share.microbatches
        workload, batch = self._workload, map_tensors(lambda tensor: tensor.to(self._device), microbatch.data)
        self._optimizer.zero_grad()
        output = _called(self._model, workload.inputs(batch))
        losses: Any = workload.loss(output, batch)
        loss: Any = sum(losses.values()) if isinstance(losses, dict) else losses
        # replicas average their gradients: weigh the shares of a last batch that does not divide evenly
        (loss * (microbatch.samples * self._strategy.workers / share.samples)).backward()
        if workload.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), workload.clip_norm)
        self._optimizer.step()
        if self._schedule is not None and workload.schedule_every == "step":
            self._schedule.step()
        part: Tensor = loss.detach() * (microbatch.samples / share.samples)
        return part

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _wait_for_turn(self) -> None:
        self._reckon()
        steps = [asdict(step) for step in self._steps[self._told :]]
        self._told = len(self._steps)
        gate.pass_gate({"steps": steps, "peak_bytes": peak_memory(self._device), "notes": []})
        self._mark = time.perf_counter()

    def _reckon(self) -> None:
        """Sum up the losses of the steps since the last time over the replicas, and note these steps."""
        if not self._losses:
            return
        losses = torch.stack([loss.double() for loss in self._losses])
        dist.all_reduce(losses)
        for loss, (epoch, samples, seconds) in zip(losses.tolist(), self._pending, strict=True):
            self._steps.append(Step(len(self._steps) + 1, epoch, loss, None, None, samples, seconds))
        self._losses.clear()
        self._pending.clear()

    def _peak(self) -> int:
        peak = torch.tensor([peak_memory(self._device)], dtype=torch.int64, device=self._device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return int(peak)


def _wrapped(model: nn.Module, strategy: Strategy) -> nn.Module:
    if strategy.dp > 1:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (strategy.fsdp,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers in lists of modules, which one shards one by one."""
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    layers = [layer for each in lists for layer in each if any(True for _ in layer.children())]
    return [layer for layer in layers if not isinstance(layer, (nn.ModuleList, nn.Sequential))]


def _called(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)
