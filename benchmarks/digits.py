"""Handwritten digits under each axis: accuracy on held-out digits, and how far the losses are from one worker's.

Targets: at least 97% accuracy; the loss of each of the first 20 steps within 1e-4 (relative, float32) of one worker's.

    python -m benchmarks.digits [--epochs N] [--strategy SPEC ...]
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import environment, record
from shardwise.api import compare

ACCURACY, LOSS_DIFFERENCE = 0.97, 1e-4
STRATEGIES = ("dp=2", "fsdp=2", "tp=2", "pp=2")


def row(result: dict[str, Any]) -> dict[str, Any]:
    accuracy, difference = result["metrics"]["accuracy"], result["loss_difference"]
    return {
        "strategy": result["strategy"],
        "accuracy": accuracy,
        "loss": result["loss"],
        "loss_difference": difference,
        "met": "yes" if accuracy >= ACCURACY and difference <= LOSS_DIFFERENCE else "no",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--strategy", action="append", help=f"beside single; default: {', '.join(STRATEGIES)}")
    parser.add_argument("--name", default="digits", help="of the files in results/")
    options = parser.parse_args()
    before = environment(threads=1)
    document = compare("image", ["single", *(options.strategy or STRATEGIES)], epochs=options.epochs)
    settings = {
        "epochs": options.epochs,
        "target_accuracy": ACCURACY,
        "target_loss_difference": LOSS_DIFFERENCE,
        "compared_steps": 20,
    }
    record(options.name, settings, [row(result) for result in document["results"]], document, before)


if __name__ == "__main__":
    main()
