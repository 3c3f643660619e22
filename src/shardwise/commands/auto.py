"""Implementation of `--strategy auto`: measure the machine once, plan, train, and report the prediction error.

It is the default of `train`. If the machine cannot or must not be measured, the default is `dp` over all workers, with
a note to the user. If a worker runs out of memory, the next best plan that needs less memory is tried, with a note.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwise.cluster.cluster import Cluster, check_margin
from shardwise.commands.forecast import FIRST_PREDICTS, details, own_cluster
from shardwise.commands.reported import run_reported
from shardwise.commands.request import (
    Chosen,
    TrainingRequest,
    check,
    check_step,
    settle,
    settle_length,
    settle_options,
    settle_source,
    settle_strategy,
)
from shardwise.errors import DoesNotFit, NotMeasured, RequestError, WorkerFailed
from shardwise.launch.context import is_first, rank_context
from shardwise.launch.join import join_launcher
from shardwise.planner.constraints import Constraints, allowed_changes
from shardwise.planner.explain import explanation
from shardwise.planner.plan import Candidate, Plan
from shardwise.planner.scaling import counts
from shardwise.planner.search.search import SearchResult, may_offload, search
from shardwise.predict.document import needs
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.simulate import profiles_on
from shardwise.run.calibration.local_cluster import check_hosts
from shardwise.run.control_group import Workers
from shardwise.run.training.result import Forecast
from shardwise.splitting.balance import Cuts
from shardwise.strategy import Strategy
from shardwise.units import format_bytes, format_seconds
from shardwise.workload.turns import NOT_PREDICTED
from shardwise.workload.workload import Workload

AUTO = "auto"

WRONG = 0.2
"""Relative error of a prediction above which the verdict names the part with the largest error."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Strategies chosen for this machine: the best one, and those to fall back to.

    Attributes:
        best: the candidate to train with.
        others: the candidates that fit, fastest first.
        words: the explanation, one string per paragraph.
        cuts: function that returns the cut points of a strategy with unequal stages, because its memory was predicted
            for these. It returns none for other strategies, which are cut by measured costs.
        details: function that returns the whole prediction of a candidate for reports.
        last_resort: function that searches for the best strategy with offload. It returns None if there is none.
    """

    best: Candidate
    others: tuple[Candidate, ...]
    words: tuple[str, ...]
    cuts: Callable[[Strategy], Cuts] = lambda _: ()
    details: Callable[[Candidate], Mapping[str, Any]] = lambda _: {}
    last_resort: Callable[[], Candidate | None] = lambda: None

    def smaller(self) -> Iterator[Candidate]:
        """Yield the candidates to fall back to; each needs at most 90% of the memory of the one before."""
        memory = self.best.prediction.memory.total
        for candidate in self.others:
            if candidate.prediction.memory.total < 0.9 * memory:
                memory = candidate.prediction.memory.total
                yield candidate
        last = self.last_resort()
        if last is not None and last.prediction.memory.total < 0.9 * memory:
            yield last


def choose(
    workload: Workload,
    workers: int | None = None,
    *,
    quiet: bool = False,
    margin: float | None = None,
    allow: Sequence[str] = (),
) -> Choice:
    """Choose the best strategy for this machine.

    Args:
        workload: workload to train.
        workers: number of workers; None: as many as are fastest, up to the number that was measured to pay here.
        quiet: do not print that the machine is being measured.
        margin: share of the usable memory that has to stay free; None: the default.
        allow: changes of training that the strategy may bring, as `--allow` names them.

    Raises:
        NotMeasured: the machine may not be measured, or was measured with fewer workers; or a step has turns.
        RequestError: no strategy is possible.
        DoesNotFit: no strategy fits into memory.
    """
    if workload.turns:
        raise NotMeasured(f"{NOT_PREDICTED}; it trains with single or dp")
    cluster = own_cluster(quiet=quiet).importing(workload.libraries).with_margin(margin)
    if workers is not None and workers > cluster.size:
        raise NotMeasured(
            f"this machine was measured with {cluster.size} workers, not with {workers}: run "
            f"shardwise calibrate --workers {workers}"
        )
    profiles = ScaledProfiles(profiles_on(workload, cluster))
    constraints = Constraints(
        forbidden=() if _compiles(workload, cluster) else (("compile", ""),), allowed=allowed_changes(allow)
    )
    numbers = counts(1, cluster.worthwhile) if workers is None else [workers]
    found = [search(workload, cluster, number, constraints, profiles) for number in numbers]
    fitting = [each for each in found if each.plan.best is not None]
    if not fitting:
        raise DoesNotFit(_nothing(found[-1].plan))
    best = min(fitting, key=_seconds)
    words = explanation(best.plan, cluster, best.profile_of)
    candidates = sorted(
        (candidate for each in fitting for candidate in each.plan.candidates),
        key=lambda candidate: candidate.prediction.step_seconds,
    )
    assert best.plan.best is not None

    def cuts(strategy: Strategy) -> Cuts:
        return best.cuts(strategy, cluster) if strategy.speeds else ()

    def last_resort() -> Candidate | None:
        if best.plan.best is None or best.plan.best.strategy.offload or not may_offload(cluster, constraints):
            return None
        offloading = replace(constraints, fixed={"offload": "1"})
        return search(workload, cluster, best.plan.workers, offloading, profiles).plan.best

    def told(candidate: Candidate) -> Mapping[str, Any]:
        return details(best.profile_of, candidate.strategy, cluster, candidate.prediction)

    return Choice(best.plan.best, tuple(candidates), tuple(words), cuts, told, last_resort)


def _compiles(workload: Workload, cluster: Cluster) -> bool:
    """Return whether a step can be compiled here, where the planner wants that (`SearchProblem.compile_for`)."""
    if all(nodes.device.kind != "gpu" for nodes in cluster.nodes):
        return False
    try:
        check_step(workload, Strategy(compile=1))
    except RequestError:
        return False
    return True


def _seconds(searched: SearchResult) -> float:
    best = searched.plan.best
    assert best is not None
    return best.prediction.step_seconds


def _nothing(plan: Plan) -> str:
    if plan.smallest is None:
        raise RequestError(f"no strategy for {plan.workers} workers can be for workload {plan.workload!r}")
    prediction = plan.smallest.prediction
    return (
        f"{plan.workload} does not fit into this machine: of all strategies {plan.smallest.strategy} needs least, and "
        f"a worker {needs(prediction)}"
    )


def train_automatically(
    asked: TrainingRequest,
    out: str | Path | None,
    *,
    quiet: bool = False,
    margin: float | None = None,
    allow: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Plan, train, and report the prediction error.

    Args:
        asked: the requested training. Its strategy is `auto`, or None, which falls back to `dp` if none can be chosen.
        out: the run's folder, as in `api.train`.
        quiet: print neither a progress bar nor the choice.
        margin: share of the usable memory that has to stay free; None: the default.
        allow: as in `choose`.
        options: as in `request.settle`.

    Returns:
        The document of `train`, with `explanation` and `verdict`. The verdict is None unless the prediction is off by
        more than 20%.

    Raises:
        RequestError, DoesNotFit, NotMeasured: as in `choose`; NotMeasured only if the strategy is `auto`.
        WorkerFailed: a worker died for another reason than memory, or there is nothing smaller to fall back to.
    """
    check_margin(margin)
    allowed = allowed_changes(allow)
    settled = settle_options(steps=asked.steps, epochs=asked.epochs, track=asked.track, quiet=quiet, **options)
    source = settle_source(asked.workload, asked.settings, asked.seed)
    loaded = Chosen(source, source.load())
    settle_length(settled, loaded.workload)  # before anything is measured
    check(loaded.workload, Strategy())
    context = rank_context()
    if context is not None:
        return _with_launcher(context.workers, loaded, asked, out, margin, allowed, quiet=quiet, **options)
    try:
        choice = choose(loaded.workload, asked.workers, quiet=quiet, margin=margin, allow=allowed)
    except NotMeasured as error:
        plain = _unmeasured(asked, error)
        job = settle(plain, out, quiet=quiet, chosen=loaded, **options)
        _say_unmeasured(plain, error, quiet=quiet)
        return run_reported(job).summary
    if not quiet and choice.words:
        sys.stderr.write(f"{choice.words[1]}\n")
    smaller = choice.smaller()
    candidate = choice.best
    while True:
        chosen = _chosen(loaded, candidate, choice)
        named = replace(asked, strategy=candidate.strategy, workers=None)
        job = settle(named, out, quiet=quiet, chosen=chosen, **options)
        try:
            document = _with_verdict(candidate, run_reported(job).summary, choice.words)
        except WorkerFailed as error:
            following = next(smaller, None)
            if following is None or not error.out_of_memory:
                raise
            _say_fallback(candidate.strategy, following)
            candidate = following
            continue
        if document["verdict"] is not None and not quiet:
            sys.stderr.write(f"{document['verdict']}\n")
        return document


def _chosen(loaded: Chosen, candidate: Candidate, choice: Choice) -> Chosen:
    """Return what a run needs to know of the candidate that was chosen for it."""
    forecast = Forecast.of(candidate.prediction, choice.details(candidate))
    return replace(loaded, forecast=forecast, cuts=choice.cuts(candidate.strategy))


def _with_launcher(
    count: int,
    loaded: Chosen,
    asked: TrainingRequest,
    out: str | Path | None,
    margin: float | None,
    allowed: Sequence[str],
    **options: Any,
) -> dict[str, Any]:
    """Train as one of the workers of an outer launcher with the strategy that rank 0 chooses. Collective.

    There is no fallback to a smaller strategy.
    """
    join_launcher(count)
    choice: Choice | None = None
    quiet = bool(options["quiet"])
    if is_first():
        try:
            check_hosts()
            choice = choose(loaded.workload, asked.workers or count, quiet=quiet, margin=margin, allow=allowed)
        except NotMeasured as error:
            asked = _unmeasured(asked, error)
            _say_unmeasured(asked, error, quiet=quiet)
    told = None if choice is None else (str(choice.best.strategy), choice.cuts(choice.best.strategy))
    chosen = json.loads(Workers().exchange(json.dumps(told))[0])
    strategy, cuts = chosen or (None, ())
    asked = replace(asked, strategy=strategy, workers=None if strategy else asked.workers)
    chosen = replace(loaded, cuts=tuple(map(tuple, cuts)))
    if choice is not None:
        chosen = _chosen(chosen, choice.best, choice)
    elif strategy:
        chosen = replace(chosen, forecast=Forecast(reason=FIRST_PREDICTS))
    summary = run_reported(settle(asked, out, chosen=chosen, **options)).summary
    return summary if choice is None else _with_verdict(choice.best, summary, choice.words)


def _unmeasured(asked: TrainingRequest, error: NotMeasured) -> TrainingRequest:
    """Return the request with `dp` over all workers; re-raise `error` if the requested strategy is `auto`."""
    if asked.strategy == AUTO:
        raise error
    return replace(asked, strategy=settle_strategy(None, asked.workers))


def _say_unmeasured(asked: TrainingRequest, error: NotMeasured, *, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(f"strategy {asked.strategy}, for nothing can be chosen: {error}\n")


def _with_verdict(candidate: Candidate, summary: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    return {**summary, "explanation": "\n\n".join(words), "verdict": held(candidate.prediction, summary)}


def _say_fallback(before: Strategy, candidate: Candidate) -> None:
    memory = format_bytes(candidate.prediction.memory.total)
    sys.stderr.write(f"strategy {before} ran out of memory: trying {candidate.strategy}, which needs {memory}\n")


def held(prediction: Prediction, summary: Mapping[str, Any]) -> str | None:
    """Return a sentence about a prediction that is off by more than 20%. Returns None if it is not, or is unmeasured.

    Args:
        prediction: prediction of a step.
        summary: summary of the run, as `train --json` prints it.
    """
    measured, predicted = summary["step_seconds"], prediction.step_seconds
    if not measured or abs(measured / predicted - 1) <= WRONG:
        return None
    said = f"A step took {format_seconds(measured)}, predicted were {format_seconds(predicted)}"
    share = summary.get("communication_share")
    if share is None:
        return f"{said}."
    waited = prediction.exposed_communication_seconds + prediction.bubble_seconds
    parts = {
        "waiting for other workers": (waited, share * measured),
        "computing": (predicted - waited, (1 - share) * measured),
    }
    name = max(parts, key=lambda part: abs(parts[part][1] - parts[part][0]))
    before, after = parts[name]
    return f"{said}: most wrong was {name}, {format_seconds(after)} instead of {format_seconds(before)}."
