"""Each strategy written by hand with torch's own parts, for this one model, as its tutorials write it.

A function builds model and optimizer and returns `step(inputs, targets) -> loss`, where the loss is this worker's own
(None where a pipeline stage has none). Nothing is done that a training step does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.transformer import Transformer, token_loss

Step = Callable[[Tensor, Tensor], Tensor | None]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

MICROBATCHES = 4


def data_parallel(model: Transformer, make_optimizer: MakeOptimizer) -> Step:
    return plain_loop(DistributedDataParallel(model, gradient_as_bucket_view=True), make_optimizer)


def fully_sharded(model: Transformer, make_optimizer: MakeOptimizer, *, keep_parameters: bool) -> Step:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=not keep_parameters)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep_parameters)
    return plain_loop(model, make_optimizer)


def tensor_parallel(model: Transformer, make_optimizer: MakeOptimizer) -> Step:
    mesh = init_device_mesh("cpu", (2,))
    column = ["attention.query", "attention.key", "attention.value", "mlp.up"]
    styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in column}
    styles |= {name: RowwiseParallel() for name in ("attention.out", "mlp.down")}
    for block in model.blocks:
        parallelize_module(block, mesh, styles)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    return plain_loop(model, make_optimizer)


def sequence_parallel(model: Transformer, make_optimizer: MakeOptimizer) -> Step:
    mesh = init_device_mesh("cpu", (2,))
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    column = ["attention.query", "attention.key", "attention.value", "mlp.up"]
    styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in column}
    styles |= {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.out", "mlp.down")}
    styles |= {"norm1": SequenceParallel(), "norm2": SequenceParallel(), "attention": gather, "mlp": gather}
    for block in model.blocks:
        parallelize_module(block, mesh, styles)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    return plain_loop(model, make_optimizer)


class FirstHalf(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.embedding = model.embedding
        self.blocks = model.blocks[: len(model.blocks) // 2]

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class SecondHalf(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.blocks = model.blocks[len(model.blocks) // 2 :]
        self.norm = model.norm
        self.head = model.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(self.norm(x))
        return output


def pipeline(model: Transformer, make_optimizer: MakeOptimizer) -> Step:
    rank = torch.distributed.get_rank()
    half = FirstHalf(model) if rank == 0 else SecondHalf(model)
    schedule = Schedule1F1B(PipelineStage(half, rank, 2, torch.device("cpu")), MICROBATCHES, loss_fn=token_loss)
    optimizer = make_optimizer(half.parameters())

    def step(inputs: Tensor, targets: Tensor) -> Tensor | None:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=losses)
        optimizer.step()
        return torch.stack(losses).detach().mean() if losses else None

    return step


def plain_loop(model: nn.Module, make_optimizer: MakeOptimizer) -> Step:
    optimizer = make_optimizer(model.parameters())

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = token_loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


BY_HAND: dict[str, Callable[[Transformer, MakeOptimizer], Step]] = {
    "dp=2": data_parallel,
    "fsdp=2,zero=2": partial(fully_sharded, keep_parameters=True),
    "fsdp=2": partial(fully_sharded, keep_parameters=False),
    "tp=2": tensor_parallel,
    "tp=2,sp=1": sequence_parallel,
    f"pp=2,microbatches={MICROBATCHES}": pipeline,
}
