"""What a source counts as memory, and the predicted memory counted alike.

allocated   tensors, as `torch.cuda.max_memory_allocated` says: what is predicted
reserved    what the allocator took from the device for them: the same where its segments grow (torchtitan sets
            `expandable_segments`), else more by what fragments leave unused
device      what `nvidia-smi` shows: reserved, and what CUDA and NCCL hold themselves
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from shardwise.predict.constants import Constants
from shardwise.predict.published.columns import Row, text
from shardwise.predict.transformer.memory import memory, memory_of_stage
from shardwise.predict.transformer.sizes import Setup, Sizes


@dataclass(frozen=True, slots=True)
class Counted:
    """What a source counts.

    Attributes:
        kind: `allocated`, `reserved` or `device`.
        first: whether it is rank 0 that says it, which is of the first stage, instead of the rank that needs most.
    """

    kind: str = "allocated"
    first: bool = False


def counted_of(row: Row) -> Counted:
    """What the source of a row counts, as far as it says so: tensors that are allocated where it does not."""
    words = f"{text(row, 'notes')} {text(row, 'source')}".lower()
    if "nvidia-smi" in words:
        return Counted("device")
    if "reserved" in words:
        return Counted("reserved")
    return Counted(first="nanotron" in words)  # its benchmarks print `max_memory_allocated` of rank 0


def memory_terms(sizes: Sizes, setup: Setup, counted: Counted, numbers: Constants) -> dict[str, float]:
    """Bytes by what they are for, which add up to what the source counts."""
    found = memory_of_stage(sizes, setup, 0) if counted.first else memory(sizes, setup)
    terms: dict[str, float] = dict(asdict(found))
    if counted.kind in ("reserved", "device"):
        terms["fragments"] = numbers.allocator_slack * found.total
    if counted.kind == "device":
        terms["context"] = numbers.context_bytes
    return terms
