"""Keras 3 models as workloads: `workload(model, x, y)` takes over a compiled model, see docs/keras.md."""

from shardwise.workload.keras.compiled import workload as workload

__all__ = ["workload"]
