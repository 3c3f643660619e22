"""Plans as JSON: the document that `plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.planner.equality import are_equal
from shardwise.planner.plan import Candidate, Offer, Plan
from shardwise.predict.document import PROGRAM, candidate
from shardwise.units import format_bytes, format_seconds

SHOWN = 20
"""Number of candidates that are written with all costs; the others are listed with a reason."""


def plan_document(plan: Plan, explanation: Sequence[str]) -> dict[str, Any]:
    """Build a plan's JSON document: that of `predict.document.document` plus workers, objective and search counts."""
    shown, others = plan.candidates[:SHOWN], plan.candidates[SHOWN:]
    best = plan.best
    rejected = [
        {"strategy": str(each.strategy), "reason": each.reason, "kind": each.kind, "count": each.count}
        for each in plan.rejected
    ]
    for other in others:
        assert best is not None
        if plan.constraints.objective == "memory":
            reason = f"needs {format_bytes(other.prediction.memory.total)} of a device"
        else:
            ratio = other.prediction.step_seconds / best.prediction.step_seconds
            reason = f"a step takes {format_seconds(other.prediction.step_seconds)}, {ratio:.3g} times the chosen one's"
        rejected.append({"strategy": str(other.strategy), "reason": reason, "kind": "slower", "count": 1})
    return {
        "workload": plan.workload,
        "cluster": plan.cluster,
        "workers": plan.workers,
        "objective": plan.constraints.objective,
        "program": PROGRAM,
        "precision": best and best.prediction.precision,
        "notes": list(plan.notes),
        "best": best and str(best.strategy),
        **_fastest(plan),
        "candidates": [_candidate(each, shown[0]) for each in shown],
        "rejected": rejected,
        "means": [_offer(each, plan) for each in plan.offers],
        "search_seconds": plan.seconds,
        "predicted": plan.looked_at,
        "left_out": plan.left_out,
        "explanation": "\n\n".join(explanation),
    }


def _fastest(plan: Plan) -> dict[str, Any]:
    """Return the strategy that is predicted to be fastest, and how much longer the chosen one takes, as a fraction."""
    if plan.best is None or plan.fastest is None:
        return {"fastest": None, "slower_than_fastest": None}
    ratio = plan.best.prediction.step_seconds / plan.fastest.prediction.step_seconds
    return {"fastest": str(plan.fastest.strategy), "slower_than_fastest": ratio - 1}


def _offer(offer: Offer, plan: Plan) -> dict[str, Any]:
    """Return what a means would bring: the costs of the strategy with it, and its time over that of the chosen one."""
    prediction = offer.candidate.prediction
    assert plan.best is not None
    return {
        **candidate(str(offer.candidate.strategy), prediction),
        "means": offer.means,
        "changes": list(offer.changes),
        "allowed": plan.constraints.permits(offer.candidate.strategy),
        "times_best": prediction.step_seconds / plan.best.prediction.step_seconds,
    }


def front_rows(front: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return the rows of the Pareto front, fastest first, with time and memory relative to the first candidate."""
    rows = []
    for each in front:
        first, own = front[0].prediction, each.prediction
        times = own.step_seconds / first.step_seconds
        share = own.memory.total / first.memory.total
        rows.append({**candidate(str(each.strategy), own), "times_fastest": times, "memory_share": share})
    return rows


def _candidate(each: Candidate, best: Candidate) -> dict[str, Any]:
    found = candidate(str(each.strategy), each.prediction)
    found["equal_to_best"] = each is best or are_equal(each, best)
    return found if each.dry_run is None else {**found, "dry_run": each.dry_run.document()}
