"""Measure by how much a worker's process grows when its model imports a package beside torch."""

from __future__ import annotations

from shardwise.cluster.cluster import LIBRARIES
from shardwise.parallel.mesh import default_device
from shardwise.parallel.program import Program
from shardwise.run.calibration.footprint import settled
from shardwise.run.calibration.trials import small
from shardwise.strategy import Strategy


def library_sizes() -> dict[str, int]:
    """Return the bytes of each of LIBRARIES that is installed, in the process of a worker that trains alone.

    What a training imports by itself does not count. It must run in a fresh process: a package fills the memory that
    earlier work has freed. On a GPU the memory of a worker is that of its tensors, and the result is empty.
    """
    device = default_device()
    if device.type == "cuda":
        return {}
    program = Program.build(small(1), Strategy())
    program.step_share(next(program.loader().shares(0)))
    found = {}
    for name in LIBRARIES:
        before = settled(device)
        if imported_with_a_model(name):
            found[name] = max(0, settled(device) - before)
    return found


def imported_with_a_model(name: str) -> bool:
    """Import one of LIBRARIES with all that a small model of it needs; return False if it is not installed."""
    assert name == "transformers"
    try:
        from transformers import AutoModelForCausalLM, GPT2Config
    except ImportError:
        return False
    sizes = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=8, vocab_size=8, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(sizes)  # type: ignore[no-untyped-call]
    return True
