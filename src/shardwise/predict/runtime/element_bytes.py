"""Bytes of one element of parameters, of their gradients, and of what the optimizer keeps beside its state."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.options import BF16, dtype_of
from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.predict.runtime.runtime import Runtime
from shardwise.strategy import Strategy

MASTER = 4
"""Bytes of the copy in float32 that mixed precision updates."""

WIDE = 4
"""Bytes of an element in float32, in which profiles count parameters."""


@dataclass(frozen=True, slots=True)
class ElementBytes:
    """Bytes of one element that a rank holds.

    Attributes:
        weights: of the parameter.
        gradients: of its gradient.
        copies: of copies of both in the optimizer.
        narrow: of its copy in half precision, during the passes.
    """

    weights: float
    gradients: float
    copies: float
    narrow: float = 0.0


def reduced(profile: Profile | ProfileSummary, strategy: Strategy) -> float:
    """Return the bytes of a gradient when replicas reduce it, relative to those of its parameter."""
    return min(profile.reduced, profile.half) if strategy.reduce else profile.reduced


def scattered(profile: Profile | ProfileSummary, strategy: Strategy) -> float:
    """Return the bytes of a sharded gradient when it is reduced, relative to those of its parameter."""
    return min(profile.scattered, profile.half) if strategy.reduce else profile.scattered


def element_bytes(runtime: Runtime, precision: str, strategy: Strategy) -> ElementBytes:
    """Return the bytes that one parameter takes in a runtime, beside the state of its optimizer.

    With Adam's 8 bytes, mixed precision takes 18 with gradients accumulated in float32 by the products themselves
    (Megatron-LM), 20 where they come in half precision first; float32 takes 16 (Rajbhandari et al. 2020, section 3.1).
    DeepSpeed's optimizer has gradients in float32 of its own; DDP has its buckets. FSDP keeps float32 and casts what it
    gathers.
    """
    width = ELEMENT_BYTES[BF16 if precision in ("fp8", "fp4") else dtype_of(precision)]
    if runtime.copies and not strategy.splits_parameters:
        return ElementBytes(WIDE, WIDE, 0, width)
    if runtime.autocasts or strategy.splits_parameters or width != 2:
        return ElementBytes(WIDE, WIDE, 0)
    gradients, copies = float(runtime.accumulation_bytes), MASTER
    if runtime.own_gradients and gradients == width:
        copies += WIDE
    elif runtime.own_gradients:
        gradients += width
    elif runtime.elementwise == "eager":
        buckets = strategy.sums_in_buckets and strategy.fsdp == 1
        gradients += 3 * width if buckets else width
    return ElementBytes(width, gradients, copies)
