"""Memory and kernels of compressing gradients (`compress`): errors, PowerSGD's factors, and passes over the gradients.

A method reads and writes each gradient several times. The tables count that in kernels of the program, as dry runs of
it list them; products of PowerSGD with its narrow factors take as long as reading the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from shardwise.predict.workers.holdings import Stage, Worker
from shardwise.splitting.compression import Shape, error_elements, start_elements
from shardwise.strategy import Strategy

ERROR_BYTES = 4
"""Bytes of an element of an error, in float32."""

KERNELS = {"powersgd": 12, "topk": 12, "int8": 28, "fp8": 30, "sign": 30, "bf16": 16}
"""Kernels on a flat gradient, or on its parts."""

MOVED = {"powersgd": 60, "topk": 60, "int8": 160, "fp8": 180, "sign": 240, "bf16": 90}
"""Bytes that these kernels read and write for each element of the gradient."""

TEMPORARY = {"powersgd": 4, "topk": 4, "int8": 12, "fp8": 12, "sign": 16, "bf16": 10}
"""Bytes for each element of the gradient that is in progress, beside it and its error."""


def state_bytes(strategy: Strategy, worker: Worker) -> int:
    """Return the bytes that a worker keeps from step to step: errors of its gradients, and PowerSGD's factors Q."""
    if not strategy.compress:
        return 0
    ranks = strategy.fsdp if strategy.splits_parameters and strategy.dp == 1 else 0
    shapes = [shape for flat in _flats(strategy, worker) for shape in flat]
    elements = error_elements(shapes, ranks) + start_elements(strategy.compress, shapes)
    return ERROR_BYTES * elements


def temporary_bytes(strategy: Strategy, worker: Worker) -> int:
    """Return the bytes that compressing the largest flat gradient needs for a moment."""
    if not strategy.compress:
        return 0
    largest = max((error_elements(flat) for flat in _flats(strategy, worker)), default=0)
    return TEMPORARY[strategy.compress.kind] * largest


def flats_of(strategy: Strategy, stage: Stage) -> Iterator[tuple[Shape, ...]]:
    """Yield the shapes in each flat gradient of a stage that is compressed, as its compression sees them."""
    if not strategy.splits_parameters:
        yield from (bucket.shapes for bucket in stage.buckets)
        return
    groups = [block.gathered for block in stage.blocks] + [stage.root]
    for group in groups:
        if group is None or not group.shapes:
            continue
        if strategy.dp == 1:
            yield group.shapes
        else:
            yield tuple((ceil(shape[0] / strategy.fsdp), *shape[1:]) for shape in group.shapes)


def _flats(strategy: Strategy, worker: Worker) -> Iterator[tuple[Shape, ...]]:
    for stage in worker.stages:
        yield from flats_of(strategy, stage)
    yield from (bucket.shapes for bucket in worker.twice)
