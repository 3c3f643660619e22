"""Convert predictions to the JSON document that `simulate` and `plan` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.predict.prediction import Prediction, categories
from shardwise.units import format_bytes, format_seconds, format_share

PARTS = {
    "compute_seconds": "computing",
    "exposed_communication_seconds": "waiting for communication",
    "bubble_seconds": "waiting for other stages of the pipeline",
    "optimizer_seconds": "updating parameters",
    "host_seconds": "waiting for the host to start kernels",
}
"""Parts that add up to a step -> their words."""

PROGRAM = "shardwise"
"""Trainer whose program a prediction is for."""


def candidate(strategy: str, prediction: Prediction) -> dict[str, Any]:
    """Return the JSON object of one strategy and its prediction; times in seconds, memory in bytes."""
    memory = prediction.memory
    return {
        "strategy": strategy,
        "step_seconds": prediction.step_seconds,
        "low_seconds": prediction.low_seconds,
        "high_seconds": prediction.high_seconds,
        "relative_error": prediction.error,
        "compute_seconds": prediction.compute_seconds,
        "communication_seconds": prediction.communication_seconds,
        "exposed_communication_seconds": prediction.exposed_communication_seconds,
        "bubble_seconds": prediction.bubble_seconds,
        "optimizer_seconds": prediction.optimizer_seconds,
        "host_seconds": prediction.host_seconds,
        "alpha": prediction.alpha,
        "exposed_alpha": prediction.exposed_alpha,
        "memory_bytes": memory.total,
        "memory": categories(memory),
        "memory_available_bytes": prediction.memory_available,
        "memory_usable_bytes": prediction.memory_usable,
        "margin": prediction.margin,
        "fits": prediction.fits,
        "samples_per_second": prediction.samples_per_second,
        "precision": prediction.precision,
        "model_flops_utilization": prediction.model_flops_utilization,
        "half_flops_utilization": prediction.half_flops_utilization,
        "notes": list(prediction.notes),
        "terms": dict(prediction.terms),
        "origins": dict(prediction.origins),
    }


def step_words(prediction: Prediction) -> str:
    """Format the step time with the error that nine in ten such predictions keep: '2.6 s ± 18%'."""
    error = "" if prediction.error is None else f" ± {format_share(prediction.error)}"
    return f"{format_seconds(prediction.step_seconds)}{error}"


def document(
    workload: str,
    cluster: str,
    predictions: Sequence[tuple[str, Prediction]],
    rejected: Sequence[tuple[str, str]],
    seconds: float,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Build the document of predictions for several strategies.

    Its `best` is the fastest strategy that fits into memory, None if none fits.

    Args:
        workload: name of the workload.
        cluster: name of the cluster.
        predictions: (strategy, prediction) of each strategy.
        rejected: (strategy, reason) of each strategy that cannot work.
        seconds: time that it took to predict.
        notes: remarks on the workload.
    """
    candidates = [candidate(strategy, prediction) for strategy, prediction in predictions]
    fitting = [each for each in candidates if each["fits"]]
    best = min(fitting, key=lambda each: each["step_seconds"], default=None)
    return {
        "workload": workload,
        "cluster": cluster,
        "program": PROGRAM,
        "notes": list(notes),
        "best": best and best["strategy"],
        "candidates": candidates,
        "rejected": [{"strategy": strategy, "reason": reason} for strategy, reason in rejected],
        "search_seconds": seconds,
        "explanation": " ".join(explained(strategy, prediction) for strategy, prediction in predictions),
    }


def explained(strategy: str, prediction: Prediction) -> str:
    """Explain in two sentences how the step time and the memory of a strategy are composed."""
    parts = {words: getattr(prediction, name) for name, words in PARTS.items()}
    spent = [f"{format_share(value / prediction.step_seconds)} {name}" for name, value in _largest(parts)]
    held = [f"{format_bytes(value)} of {name}" for name, value in _largest(categories(prediction.memory))]
    return (
        f"{strategy}: a step takes {step_words(prediction)} in {prediction.precision}, {', '.join(spent)}. "
        f"A device {needs(prediction)}: {', '.join(held)}.{note_words(prediction)}"
    )


def note_words(prediction: Prediction) -> str:
    """Format the notes of a prediction as sentences, each after a space."""
    return "".join(f" Note: {note}." for note in prediction.notes)


def needs(prediction: Prediction, limit: int | None = None) -> str:
    """Say what a device needs and how near that is to what it may need.

    Args:
        prediction: prediction of a strategy.
        limit: bytes that the user allows; None allows all but the margin.
    """
    need, have, usable = prediction.memory.total, prediction.memory_available, format_bytes(prediction.memory_usable)
    said = f"usable, with {format_share(prediction.margin)} of its {usable} left free"
    if limit is not None and limit < have:
        have, said = limit, f"that --max-memory allows of its {usable}"
    if need > have:
        return f"needs {format_bytes(need)}, more than the {format_bytes(have)} {said}, and does not fit"
    return f"needs {format_bytes(need)} of the {format_bytes(have)} {said} ({format_share(need / have)})"


def _largest(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return (name, value) of the parts with at least one percent of the total, largest first."""
    total = sum(parts.values())
    shown = [(name, value) for name, value in parts.items() if value >= 0.01 * total > 0]
    return sorted(shown, key=lambda part: -part[1])
