"""Random draws of datasets: from the global generators of Python, numpy and torch, seeded so that all workers agree."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

DrawState = tuple[Any, tuple[Any, ...], bytes]


def seed_draws(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (on the CPU) from a key of whole numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)


def draw_state() -> DrawState:
    """Return the state of the three generators; it compares equal unless something was drawn in between."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = state
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.default_generator.get_state().numpy().tobytes()


def restore_draws(state: DrawState) -> None:
    """Set the three generators back to an earlier state."""
    python, (kind, keys, *rest), of_torch = state
    random.setstate(python)
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.default_generator.set_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))


@contextmanager
def drawing_from(*key: int) -> Iterator[None]:
    """Seed the generators for the block, and restore their state afterwards, so that nothing else is affected."""
    before = draw_state()
    seed_draws(*key)
    try:
        yield
    finally:
        restore_draws(before)
