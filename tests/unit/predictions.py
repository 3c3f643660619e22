"""Predictions by hand, for tests that compare them."""

from __future__ import annotations

from shardwise.predict.prediction import Memory, Prediction


def prediction(
    compute: float, exposed: float = 0.0, bubble: float = 0.0, *, memory: int = 1, error: float | None = 0.2
) -> Prediction:
    """A step that computes, waits for communication and for its pipeline so many seconds; `memory` in bytes."""
    return Prediction(
        step_seconds=compute + exposed + bubble,
        compute_seconds=compute,
        communication_seconds=exposed,
        exposed_communication_seconds=exposed,
        bubble_seconds=bubble,
        optimizer_seconds=0.0,
        host_seconds=0.0,
        memory=Memory(parameters=memory, gradients=0, optimizer=0, activations=0, temporary=0),
        memory_available=1000,
        model_flops=1.0,
        peak_flops=1.0,
        samples=4,
        error=error,
    )
