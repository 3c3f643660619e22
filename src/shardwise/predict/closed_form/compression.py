"""Memory and kernels of compressing gradients (`compress`): errors, PowerSGD's factors, and passes over the gradients.

A method reads and writes each gradient several times. Products of PowerSGD with its narrow factors take as long as
reading the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from shardwise.predict.workers.holdings import Stage, Worker
from shardwise.splitting.compression import CODE_BITS, Shape, error_elements, start_elements
from shardwise.strategy import Strategy

ERROR_BYTES = 4
"""Bytes of an element of an error, in float32."""


@dataclass(frozen=True, slots=True)
class CompressionWork:
    """Work of compressing one flat gradient, as dry runs of a GPT list it (width 1024, on four replicas).

    Attributes:
        kernels: number of kernels.
        moved: bytes that they read and write for each element of the gradient.
        temporary: bytes for each element that are needed for a moment, beside the gradient and its error.
    """

    kernels: int
    moved: int
    temporary: int


WHOLE = {
    "powersgd": CompressionWork(25, 72, 0),
    "topk": CompressionWork(23, 98, 2),
    "int8": CompressionWork(41, 194, 8),
    "fp8": CompressionWork(39, 184, 8),
    "sign": CompressionWork(65, 228, 6),
    "bf16": CompressionWork(18, 125, 14),
}
"""Work for gradients that each replica gets whole."""

SCATTERED = {
    "powersgd": CompressionWork(69, 127, 16),
    "topk": CompressionWork(25, 65, 3),
    "int8": CompressionWork(25, 141, 8),
    "fp8": CompressionWork(25, 141, 8),
    "sign": CompressionWork(37, 157, 7),
    "bf16": CompressionWork(13, 90, 9),
}
"""Work for gradients that are reduce-scattered."""


def work_of(strategy: Strategy) -> CompressionWork:
    """Return the work of a strategy that compresses, for each flat gradient."""
    scattered = strategy.splits_parameters and strategy.dp == 1
    return (SCATTERED if scattered else WHOLE)[strategy.compress.kind]


def state_bytes(strategy: Strategy, worker: Worker) -> int:
    """Return the bytes that a worker keeps from step to step: errors of its gradients, and PowerSGD's factors Q."""
    if not strategy.compress:
        return 0
    ranks = strategy.fsdp if strategy.splits_parameters and strategy.dp == 1 else 0
    shapes = [shape for flat in _flats(strategy, worker) for shape in flat]
    elements = error_elements(shapes, ranks) + start_elements(strategy.compress, shapes)
    return ERROR_BYTES * elements


def temporary_bytes(strategy: Strategy, worker: Worker) -> int:
    """Return the bytes that compressing gradients needs for a moment.

    They are those of the largest flat gradient, or of the sums in code that all buckets keep until they are waited for.
    """
    if not strategy.compress:
        return 0
    sizes = [error_elements(flat) for flat in _flats(strategy, worker)]
    codes = 0
    if strategy.compress.kind in CODE_BITS and strategy.sums_in_buckets:
        codes = sum(sizes) * CODE_BITS[strategy.compress.kind] // 8
    return max(work_of(strategy).temporary * max(sizes, default=0), codes)


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
