"""Kind of memory that a source reports, and the predicted memory counted in the same way.

allocated   tensors, as in `torch.cuda.max_memory_allocated`: the quantity that is predicted
reserved    memory that the allocator took from the device: equal to allocated if its memory segments can grow
            (torchtitan sets `expandable_segments`), else more because of fragmentation
device      memory that `nvidia-smi` shows: reserved, and what CUDA and NCCL hold themselves
"""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.predict.closed_form.memory import worker_memory
from shardwise.predict.closed_form.step_time import Costs
from shardwise.predict.hardware.constants import Constants
from shardwise.predict.prediction import categories
from shardwise.predict.published.columns import Row, text


@dataclass(frozen=True, slots=True)
class ReportedMemory:
    """Kind of memory that a source reports, and of which rank.

    Attributes:
        kind: `allocated`, `reserved` or `device`.
        first: whether it is the memory of rank 0, in the first pipeline stage, instead of the rank that needs most.
    """

    kind: str = "allocated"
    first: bool = False


def counted_of(row: Row) -> ReportedMemory:
    """Return the kind of memory that a row's source reports, by words in its notes; `allocated` if they do not say."""
    words = f"{text(row, 'notes')} {text(row, 'source')}".lower()
    if "nvidia-smi" in words:
        return ReportedMemory("device")
    if "reserved" in words:
        return ReportedMemory("reserved")
    return ReportedMemory(first="nanotron" in words)  # its benchmarks print `max_memory_allocated` of rank 0


def memory_terms(costs: Costs, counted: ReportedMemory, numbers: Constants) -> dict[str, float]:
    """Return the predicted bytes by category. They add up to the kind of memory that the source reports."""
    workers = costs.parts.workers[:1] if counted.first else costs.parts.workers
    device = costs.times.device
    memories = (worker_memory(costs.profile, costs.strategy, worker, device) for worker in workers)
    found = max(memories, key=lambda memory: memory.total)
    terms: dict[str, float] = dict(categories(found))
    if counted.kind in ("reserved", "device"):
        terms["fragments"] = numbers.allocator_slack * found.total
    if counted.kind == "device":
        terms["context"] = numbers.context_bytes
    return terms
