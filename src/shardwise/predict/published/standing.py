"""Standing: what Shardwise itself would take for runs of other software, on the same machine with the same strategy.

Each run's sizes become the workload `gpt`, whose perceptron always has a gate: where the run's has none, it is as wide
as gives equal parameters. Precisions narrower than bf16 become bf16, the narrowest that Shardwise computes in. Parts
are compiled, as plans for GPUs have them. Without a pipeline zero=1 becomes zero=2: other software's zero=1 splits the
float32 parameters, too, which Shardwise's keeps on every replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwise.errors import RequestError, one_line
from shardwise.options import SELECTIVE, Recompute
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.published.row import PublishedRun
from shardwise.predict.simulate import simulate
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload

ROWS = 5
"""Most rows of a group that are looked at, evenly spaced: each model is traced, which takes seconds."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A published run and what Shardwise would take for it.

    Attributes:
        run: the run.
        own: the prediction for the run's own software.
        strategy: the strategy of Shardwise that is nearest to the run's; None if there is none.
        prediction: the prediction for Shardwise; None if it cannot run this.
        reason: why it cannot.
    """

    run: PublishedRun
    own: Prediction
    strategy: Strategy | None = None
    prediction: Prediction | None = None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        """Return the JSON object that `validate --standing` prints; times in seconds, memory in bytes."""
        found = self.prediction
        return {
            "line": self.run.line,
            "group": self.run.group,
            "run": self.run.label,
            "runtime": self.run.how.runtime.name,
            "computes": self.run.how.linear_dtype,
            "strategy": self.strategy and str(self.strategy),
            "measured_seconds": self.run.step_seconds,
            "predicted_seconds": self.own.step_seconds,
            "shardwise_seconds": found and found.step_seconds,
            "shardwise_memory_bytes": found and found.memory.tensors,
            "predicted_memory_bytes": self.own.memory.tensors,
            "ratio": found and found.step_seconds / self.own.step_seconds,
            "reason": self.reason,
        }


def standings(held: Sequence[tuple[PublishedRun, Prediction]]) -> list[Standing]:
    """Return the standing of a few runs of each group, in their order."""
    groups: dict[str, list[tuple[PublishedRun, Prediction]]] = {}
    for run, own in held:
        groups.setdefault(run.group, []).append((run, own))
    return [standing(*each) for rows in groups.values() for each in rows[:: -(-len(rows) // ROWS)]]


def standing(run: PublishedRun, own: Prediction) -> Standing:
    """Predict Shardwise on a published run's machine, with its strategy."""
    if run.how.context > 1:
        return Standing(run, own, reason="context parallelism, which Shardwise does not have")
    strategy = strategy_of(run)
    try:
        prediction = simulate(Profiles(workload_of(run)), strategy, run.cluster)
    except RequestError as error:
        return Standing(run, own, strategy, reason=one_line(str(error)))
    return Standing(run, own, strategy, prediction)


def workload_of(run: PublishedRun) -> Workload:
    """Return the workload `gpt` of a run's sizes, batch and precision."""
    sizes = run.sizes
    ffn = sizes.ffn if sizes.gated else -(-2 * sizes.ffn // (3 * 32 * run.strategy.tp)) * 32 * run.strategy.tp
    precision = "float32" if run.how.dtype in ("float32", "tf32") else "bf16"
    return load_workload(
        f"gpt:layers={sizes.layers},hidden={sizes.hidden},heads={sizes.heads},kv_heads={sizes.kv_heads},ffn={ffn},"
        f"vocabulary={sizes.vocab},sequence={sizes.sequence},tied={sizes.tied},batch_size={run.batch_size},"
        f"precision={precision}"
    )


def strategy_of(run: PublishedRun) -> Strategy:
    """Return the run's strategy with the recomputation of Shardwise that is nearest to what the software computes.

    Of attention alone nothing is left to compute again: Shardwise never keeps its scores.
    """
    nearest = {"layers": Recompute.part(1, 2), "operations": SELECTIVE}
    zero = 2 if run.strategy.zero == 1 and run.strategy.pp == 1 else run.strategy.zero
    recompute = nearest.get(run.how.recompute, run.strategy.recompute)
    return replace(run.strategy, recompute=recompute, zero=zero, compile=1)
