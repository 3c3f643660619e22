"""Optimizer step over workers: clipping by the global norm, sharded states, ZeRO-1."""
