"""Modules of torch whose training depends on which samples share a worker, and that are therefore refused."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.errors import WorkloadError
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def check_modules(workload: Workload, strategy: Strategy, model: nn.Module) -> None:
    """Check that each module of a plain model can be trained by several workers as by one.

    Args:
        workload: the workload.
        strategy: its strategy.
        model: its plain module; the parameters need no values.

    Raises:
        WorkloadError: a module cannot; the message names it and what would do.
    """
    if strategy.workers == 1:
        return
    for name, module in model.named_modules():
        where = f"{name or 'the model'} of workload {workload.name!r}"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (why := _why(module, strategy)):
            raise WorkloadError(f"{where} {why}, or use one worker")
        if strategy.stale and isinstance(module, _BatchNorm):
            raise WorkloadError(
                f"{where} normalises over the samples of all workers, and with staleness={strategy.staleness} these "
                "take different steps: use staleness=0, or a norm of each sample (GroupNorm, LayerNorm)"
            )


def _why(module: nn.Embedding | nn.EmbeddingBag, strategy: Strategy) -> str:
    """Return why several workers cannot train an embedding as one does, and the remedy; empty if they can."""
    if module.max_norm is not None:
        return (
            f"has max_norm={module.max_norm:g}, which rescales the rows that a batch uses, on each worker others: "
            "bound the norm of all rows in the model's forward"
        )
    if module.scale_grad_by_freq:
        return "has scale_grad_by_freq, which counts how often a worker's own samples use a row: leave it out"
    if module.sparse and not strategy.ps:
        return (
            "has sparse=True, and sparse gradients cannot be averaged over workers: leave it out, or use parameter "
            "servers (ps=1 with dp=2), which can"
        )
    return ""
