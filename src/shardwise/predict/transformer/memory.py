"""Peak memory of the rank that needs most, from sizes.

parameters, gradients, optimizer    bytes per parameter by precision, divided by what shards them (Rajbhandari 2020)
activations                         per block and microbatch: s b h (34 + 5 a s / h) and its parts (Korthikanti 2022)
temporary                           logits, gathered parameters of one block
"""

from __future__ import annotations

from shardwise.predict.prediction import Memory
from shardwise.predict.transformer.sizes import Setup, Sizes


def memory(sizes: Sizes, setup: Setup) -> Memory:
    """Peak memory of one rank of the first stage, in bytes."""
    return Memory(parameters=0, gradients=0, optimizer=0, activations=0, temporary=0)
