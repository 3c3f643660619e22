"""A made-up cluster with round numbers, and a transformer on it whose step can be summed by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from shardwise.cluster.cluster import Cluster, Device, Level, Nodes
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.hardware.constants import Constants
from shardwise.predict.runtime.profile import transformer_profile
from shardwise.predict.runtime.runtime import Runtime
from shardwise.predict.runtime.sizes import Computation, Sizes
from shardwise.strategy import Strategy

H, L, V, S = 4096, 8, 50257, 2048
SIZES = Sizes(
    layers=L, hidden=H, heads=32, kv_heads=32, ffn=4 * H, vocab=V, sequence=S, gated=False, tied=True, biases=True
)
RUNTIME = Runtime(
    name="by hand",
    attention="flash",
    elementwise="megatron",
    loss="megatron",
    padded=True,
    overlap_gradients=False,
    overlap_pipeline=False,
    keeps_outputs=False,
    gradient_bytes=2,
    gathered_bytes=2,
    accumulation_bytes=2,
)
GPU = Device(
    name="gpu",
    kind="gpu",
    flops={"bf16": 1e14, "fp16": 1e14, "tf32": 1e14, "float32": 1e14},
    memory_bytes=80 * 2**30,
    memory_bandwidth=1e12,
    cores=100,
    launch_seconds=0.0,
)
CLUSTER = Cluster(
    name="round",
    nodes=(Nodes(GPU, 8, 4),),
    levels=(
        Level(name="nvlink", span=8, bandwidth=100e9, latency=0.0),
        Level(name="infiniband", span=32, bandwidth=10e9, latency=0.0),
    ),
)
FREE = {field.name: 0.0 for field in fields(Constants)}
ONE = dict.fromkeys(("memory_share", "link_share", "network_share", "sustained_default", "attention_forward"), 1.0)
NUMBERS = Constants(**{**FREE, **ONE, "attention_backward": 1.0, "hosted_share": 0.5, "overlap_loss": 0.25})
"""Everything at its datasheet's rate, nothing for starts and hops, half of a network that the host drives."""


def computation(runtime: Runtime = RUNTIME, **changes: Any) -> Computation:
    """Return how one rank computes a microbatch in half precision; `changes` may name fields of the runtime too."""
    kept = {"sequence_parallel"}  # of the computation, not of the software
    own = {name: changes.pop(name) for name in list(changes) if hasattr(runtime, name) and name not in kept}
    values: dict[str, Any] = {
        "tensor": 1,
        "context": 1,
        "sequence_parallel": False,
        "micro_batch": 1,
        "recompute": "none",
        "dtype": "bf16",
        "scaling": "",
        "runtime": replace(runtime, **own),
    }
    values.update(changes)
    return Computation(**{"linear_dtype": values["dtype"], **values})


def costs(
    spelled: str, sizes: Sizes = SIZES, runtime: Runtime = RUNTIME, cluster: Cluster = CLUSTER, **changes: Any
) -> Costs:
    """Return the costs of a strategy; it has four microbatches unless it says otherwise."""
    strategy = Strategy.parse(spelled)
    strategy = strategy if strategy.microbatches else strategy.with_(microbatches=4)
    how = computation(runtime, tensor=strategy.tp, sequence_parallel=bool(strategy.sp), **changes)
    batch = how.micro_batch * strategy.microbatches * strategy.replicas
    return costs_of(transformer_profile(sizes, how, batch), strategy, cluster)
