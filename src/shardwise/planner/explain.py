"""Explain a plan in words.

The text says what the model needs, what binds, how data parallel compares with model parallel, why the others lost, and
what would change the choice. Every number in it comes from a prediction for this workload and cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Sample
from shardwise.errors import StrategyError, WorkloadError
from shardwise.options import EQUAL
from shardwise.planner.equality import WITHIN, are_equal
from shardwise.planner.plan import Candidate, Offer, Plan
from shardwise.predict.closed_form.step_time import costs_of, predict
from shardwise.predict.closed_form.unequal_shares import ProfileOf, predict_shares
from shardwise.predict.document import PARTS, needs, note_words, step_words
from shardwise.predict.prediction import Prediction
from shardwise.predict.runtime.element_bytes import WIDE, element_bytes
from shardwise.strategy import Strategy
from shardwise.units import format_bits, format_bytes, format_seconds, format_share

CHANGES = (0.1, 0.25, 4.0, 10.0)
"""Factors by which the bandwidth of each kind of link is changed, to see if the choice changes."""

TRIED = 24
"""Number of best candidates that are compared on changed clusters, beside the pure ones."""


def explanation(plan: Plan, cluster: Cluster, profile_of: ProfileOf) -> list[str]:
    """Return the explanation of a plan, one paragraph per entry.

    Args:
        plan: plan to explain.
        cluster: cluster that the plan was made for.
        profile_of: profiles of the search, by strategy.
    """
    pure = _pure(plan, cluster, profile_of)
    if plan.best is None:
        return [_needs(plan, profile_of), _nothing_fits(plan)]
    return [
        _needs(plan, profile_of),
        _chosen(plan, plan.best),
        *_simpler(plan, plan.best),
        *_means(plan, plan.best),
        *_offloaded(plan),
        *_unequal(plan.best, cluster, profile_of),
        *_data_against_model(plan, pure, profile_of),
        *_runner_up(plan),
        *_changes(plan, pure, cluster, profile_of),
    ]


def _needs(plan: Plan, profile_of: ProfileOf) -> str:
    """Say how much memory training would need on one device alone."""
    batch = "one sample at a time"
    best = plan.best or plan.smallest
    size = 1 if best is None else _batch_size(best)
    try:
        profile = profile_of(Strategy(microbatches=size))
    except (StrategyError, WorkloadError) as error:
        return f"{plan.workload}: one device alone cannot train it: {error}."
    elements = sum(parameter.elements for parameter in profile.parameters if parameter.trained)
    each = element_bytes(profile.runtime, profile.precision, Strategy())
    weights = round(sum(parameter.bytes for parameter in profile.parameters) * each.weights / WIDE)
    gradients = round(elements * each.gradients)
    state = round(elements * (profile.update.state_bytes + each.copies))
    return (
        f"{plan.workload} has {_count(elements)} trained parameters. One device alone would hold "
        f"{format_bytes(weights)} of parameters, {format_bytes(gradients)} of gradients, {format_bytes(state)} of "
        f"optimizer state and, with {batch}, {format_bytes(profile.saved[-1])} of activations; a device here has "
        f"{format_bytes(_memory(plan))} usable."
    )


def _batch_size(candidate: Candidate) -> int:
    return candidate.prediction.samples


def _memory(plan: Plan) -> int:
    best = plan.best or plan.smallest
    assert best is not None
    available = best.prediction.memory_available
    return available if plan.constraints.max_memory is None else min(available, plan.constraints.max_memory)


def _nothing_fits(plan: Plan) -> str:
    if plan.smallest is None:
        return f"No strategy for {plan.workers} devices can be."
    need, have = plan.smallest.prediction.memory.total, _memory(plan)
    return (
        f"Nothing fits into {plan.workers} devices: {plan.smallest.strategy} needs least, {format_bytes(need)} of a "
        f"device, {format_bytes(need - have)} more than the {format_bytes(have)} there are."
    )


def _chosen(plan: Plan, best: Candidate) -> str:
    prediction = best.prediction
    parts = ", ".join(f"{format_share(share)} {name}" for name, share in _shares(prediction))
    return (
        f"Chosen: {best.strategy}. A step of {_program(plan)} takes {step_words(prediction)} in "
        f"{prediction.precision}: {parts}. {_binding(best)} "
        f"A device {needs(prediction, plan.constraints.max_memory)}.{note_words(prediction)}"
    )


def _simpler(plan: Plan, best: Candidate) -> Iterator[str]:
    """Say which strategy is predicted to be faster than the chosen one, which is simpler."""
    fastest = plan.fastest
    if plan.constraints.objective == "memory" or fastest is None or fastest is best:
        return
    share = best.prediction.step_seconds / fastest.prediction.step_seconds - 1
    faster = f"{format_share(share)} faster" if share >= WITHIN else f"faster by less than {format_share(WITHIN)}"
    yield f"{fastest.strategy} is predicted {faster}, which cannot be told apart: the simpler is chosen."


WORTHWHILE = 0.1
"""Share of the step that a means has to save to be named in the explanation."""

SHOWN_OFFERS = 4
"""Largest number of means that the explanation names: those that change training least."""


def _means(plan: Plan, best: Candidate) -> Iterator[str]:
    """Say what the means that change training bring: the chosen one, or those that the user has not allowed."""
    changes = best.strategy.changes
    if changes:
        exact = min(
            (each for each in plan.candidates if not each.strategy.changes),
            key=lambda each: each.prediction.step_seconds,
            default=None,
        )
        other = "" if exact is None else f" Without it {exact.strategy} takes {step_words(exact.prediction)}."
        yield f"It changes training ({' and '.join(changes)}): it does not compute what one process computes.{other}"
        return
    limit = (1 - WORTHWHILE) * best.prediction.step_seconds
    good = [each for each in plan.offers if each.candidate.prediction.step_seconds <= limit][:SHOWN_OFFERS]
    if good:
        named = "; ".join(_offered(offer) for offer in good)
        needed = " ".join(f"--allow {word}" for word in dict.fromkeys(word for each in good for word in each.changes))
        yield f"Means that change training would shorten the step: {named}. {needed} lets plan choose among them."


def _offered(offer: Offer) -> str:
    seconds = format_seconds(offer.candidate.prediction.step_seconds)
    return f"{offer.candidate.strategy} takes {seconds} ({' and '.join(offer.changes)})"


def _program(plan: Plan) -> str:
    """Name the program whose step is predicted."""
    software = plan.constraints.software
    return "Shardwise's own program" if software is None else f"{software.abilities.title}'s program"


def _offloaded(plan: Plan) -> list[str]:
    """Say why parameters and optimizer state are offloaded to the hosts, if they are."""
    best = plan.best
    if best is None or not best.strategy.offload:
        return []
    found = (
        "With offload=1 parameters, gradients and optimizer state lie in the memory of the hosts, which update them; "
        "each block comes to the device when it computes. That is slow, more devices would be faster."
    )
    without = plan.smallest
    if "offload" not in plan.constraints.fixed and without is not None:
        found += (
            f" Without it nothing fits: {without.strategy} needs least, "
            f"{format_bytes(without.prediction.memory.total)} of a device."
        )
    return [found]


def _unequal(best: Candidate, cluster: Cluster, profile_of: ProfileOf) -> Iterator[str]:
    """Say why stages are unequal although all devices are of one kind, if they are."""
    strategy = best.strategy
    if not strategy.speeds or not cluster.homogeneous:
        return
    equal = strategy.with_(speeds=EQUAL)
    need = predict(profile_of(equal), equal, cluster).memory.total
    yield (
        f"With stages as equal as they can be a device would need {format_bytes(need)}: speeds={strategy.speeds} gives "
        "fewer layers to the workers that keep most."
    )


def _shares(prediction: Prediction) -> list[tuple[str, float]]:
    """Return (part in words, share of the step), largest first, without parts below one percent."""
    found = [(words, getattr(prediction, name) / prediction.step_seconds) for name, words in PARTS.items()]
    return sorted((part for part in found if part[1] >= 0.01), key=lambda part: -part[1])


def _binding(candidate: Candidate) -> str:
    """Say which part of the step would have to shrink most for a faster step."""
    prediction = candidate.prediction
    waits = {name: value for name, value in _shares(prediction) if name != "computing"}
    if not waits or max(waits.values()) < 0.1:
        return "Computing binds: only more or faster devices would help."
    name = max(waits, key=lambda key: waits[key])
    if name != "waiting for communication":
        return f"What binds beside computing is {name}."
    terms = {key: value for key, value in prediction.terms.items() if value > 0}
    largest = max(terms, key=lambda key: terms[key], default=None)
    return "What binds beside computing is communication" + (f", most of it {largest}." if largest else ".")


def _pure(plan: Plan, cluster: Cluster, profile_of: ProfileOf) -> list[Candidate]:
    """Predict the pure strategies, which use one axis over all devices."""
    found = []
    for axis in ("dp", "fsdp", "tp", "pp") if plan.workers > 1 else ():
        strategy = Strategy.parse(f"{axis}={plan.workers}")
        refused = any(entry.kind == "model" and _covers(entry.strategy, strategy) for entry in plan.rejected)
        if refused or plan.constraints.refusal(strategy) is not None:
            continue
        try:
            found.append(Candidate(strategy, predict(profile_of(strategy), strategy, cluster)))
        except (StrategyError, WorkloadError):
            continue
    return found


def _covers(refused: Strategy, strategy: Strategy) -> bool:
    """Return whether the model's refusal of a pure tp strategy applies to this strategy, which has the same tp."""
    return refused.tp > 1 and refused.tp == strategy.tp and refused.workers == refused.tp


def _data_against_model(plan: Plan, pure: Sequence[Candidate], profile_of: ProfileOf) -> Iterator[str]:
    """Compare the pure strategies as T = T_compute (1 + alpha), with the bytes that each kind sends."""
    if not pure:
        return
    whole = sum(p.bytes for p in profile_of(pure[0].strategy).parameters if p.trained)
    lines = [f"Data parallel workers send each other the gradients, {format_bytes(whole)} once a step"]
    tensor = next((each for each in pure if each.strategy.tp > 1), None)
    if tensor is not None:
        profile = profile_of(tensor.strategy)
        sent = sum(
            exchange.bytes
            for segment in profile.segments
            for each in (segment.layer.forward, segment.layer.backward)
            for exchange in each.exchanges
        )
        count = tensor.prediction.samples // profile.microbatch
        lines.append(f"tensor parallel workers the activations, {format_bytes(sent * count)} a step")
    pipeline = next((each for each in pure if each.strategy.pp > 1), None)
    if pipeline is not None:
        profile = profile_of(pipeline.strategy)
        message = min((segment.message for segment in profile.segments[1:]), default=0)
        count = pipeline.prediction.samples // profile.microbatch
        lines.append(f"neighbours in a pipeline {format_bytes(2 * message * count)} or more")
    each = "; ".join(_alpha(candidate) for candidate in pure)
    yield f"{', '.join(lines)}. With T = T_compute (1 + alpha), alpha of what is not hidden behind computing: {each}."


def _alpha(candidate: Candidate) -> str:
    prediction = candidate.prediction
    room = "" if prediction.fits else f", but needs {format_bytes(prediction.memory.total)} and does not fit"
    return (
        f"{candidate.strategy} {format_seconds(prediction.step_seconds)} = "
        f"{format_seconds(prediction.compute_seconds)} (1 + {prediction.exposed_alpha:.2f})"
        f"{_rest(prediction)}{room}"
    )


def _rest(prediction: Prediction) -> str:
    """Say how much of a step is neither computing nor communication."""
    bubble = prediction.bubble_seconds
    other = prediction.optimizer_seconds + prediction.host_seconds
    words = [f"{format_seconds(bubble)} bubble"] if bubble >= 0.01 * prediction.step_seconds else []
    words += [f"{format_seconds(other)} optimizer and host"] if other >= 0.01 * prediction.step_seconds else []
    return "".join(f" + {word}" for word in words)


def _runner_up(plan: Plan) -> Iterator[str]:
    """Say why the next best candidate lost, preferably one with other axes than the best."""
    best = plan.best
    assert best is not None
    other = next((each for each in plan.candidates[1:] if each.strategy.kind != best.strategy.kind), None)
    other = other or next(iter(plan.candidates[1:]), None)
    if other is None:
        slower = sum(entry.count for entry in plan.rejected if entry.kind == "slower")
        yield others_are_slower(slower) if slower else "No other strategy fits."
        return
    if plan.constraints.objective == "memory":
        need = format_bytes(other.prediction.memory.total - best.prediction.memory.total)
        yield f"The runner-up {other.strategy} needs {need} more of a device."
        return
    more = {words: getattr(other.prediction, name) - getattr(best.prediction, name) for name, words in PARTS.items()}
    most = max(more, key=lambda words: more[words])
    seconds = other.prediction.step_seconds - best.prediction.step_seconds
    reason = (
        f", most of it {most} ({format_seconds(more[most])} more)"
        if more[most] > 0 and seconds >= WITHIN * best.prediction.step_seconds
        else ""
    )
    kind = " of another kind" if other.strategy.kind != best.strategy.kind else ""
    longer = longer_words(seconds / best.prediction.step_seconds)
    unsure = ""
    if are_equal(other, best) and abs(seconds) >= WITHIN * best.prediction.step_seconds:
        unsure = ". Predictions cannot tell the two apart"
    yield f"The runner-up{kind}, {other.strategy}, {longer}{reason}{unsure}."


def longer_words(share: float) -> str:
    """Say by how much a step takes longer, in whole percent; less than one percent is equal, and may be shorter."""
    if abs(share) < WITHIN:
        return f"takes as long within {format_share(WITHIN)}"
    return f"takes {format_share(share)} longer" if share > 0 else f"takes {format_share(-share)} less"


def others_are_slower(count: int) -> str:
    """Say that no other strategy was predicted to fit because the others, `count` of them, cannot be as fast."""
    if count == 1:
        return "The only other strategy that may fit is slower."
    return f"The other {count:,} strategies that may fit are slower."


# ---- what would change the choice -----------------------------------------------------------------------------------


def _changes(plan: Plan, pure: Sequence[Candidate], cluster: Cluster, profile_of: ProfileOf) -> Iterator[str]:
    """Say which of the best candidates would be chosen if links were faster or slower."""
    if plan.workers == 1:
        return
    best = plan.best
    assert best is not None
    tried = {str(each.strategy): each.strategy for each in [*_diverse(plan), *pure]}
    said: set[str] = {str(best.strategy)}
    for level in cluster.levels:
        if level.span > cluster.size and len(cluster.levels) > 1:
            continue
        for factor in CHANGES:
            changed = with_bandwidth(cluster, level.name, factor)
            found = _fastest(list(tried.values()), changed, profile_of, _memory(plan), _batch_size(best))
            if found is None or str(found.strategy) in said or _stays(best, found, changed, profile_of):
                continue
            said.add(str(found.strategy))
            yield (
                f"With {_times(factor)} the bandwidth of {level.name} ({format_bits(level.bandwidth * factor)} instead "
                f"of {format_bits(level.bandwidth)}) {found.strategy} would be best, at "
                f"{format_seconds(found.prediction.step_seconds)}."
            )
    if len(said) == 1:
        yield "Links a tenth or ten times as fast would not change the choice."


def _stays(best: Candidate, found: Candidate, changed: Cluster, profile_of: ProfileOf) -> bool:
    """Return whether the chosen strategy is equal to the fastest one on a changed cluster, too."""
    again = predict_shares(profile_of, best.strategy, changed, _batch_size(best))
    return are_equal(Candidate(best.strategy, again), found)


def _diverse(plan: Plan) -> list[Candidate]:
    """Return the best candidates, and the best one of each further combination of axes."""
    found = list(plan.candidates[:TRIED])
    seen = {each.strategy.kind for each in found}
    for candidate in plan.candidates[TRIED:]:
        if candidate.strategy.kind not in seen:
            seen.add(candidate.strategy.kind)
            found.append(candidate)
    return found


def _fastest(
    strategies: Sequence[Strategy], cluster: Cluster, profile_of: ProfileOf, room: int, batch_size: int
) -> Candidate | None:
    """Return the fastest of the strategies that fit. Returns None if none fits."""
    found: Candidate | None = None
    for strategy in strategies:
        least = found.prediction.step_seconds if found else math.inf
        if not strategy.shares:  # memory takes longer to predict than time
            costs = costs_of(profile_of(strategy), strategy, cluster, batch_size)
            if costs.step_seconds >= least:
                continue
            prediction = costs.prediction()
        else:
            prediction = predict_shares(profile_of, strategy, cluster, batch_size)
        if prediction.memory.total <= room and prediction.step_seconds < least:
            found = Candidate(strategy, prediction)
    return found


def with_bandwidth(cluster: Cluster, level: str, factor: float) -> Cluster:
    """Return the cluster with `factor` times the bandwidth on links of one kind.

    Measured collectives over these links are scaled accordingly.
    """
    levels = tuple(
        replace(each, bandwidth=each.bandwidth * factor) if each.name == level else each for each in cluster.levels
    )
    within = next(each.span for each in cluster.levels if each.name == level) <= cluster.node_size

    def joins(curve: CollectiveCurve) -> bool:
        return curve.level == level if curve.level else (curve.nodes == 1) == within

    curves = tuple(_stretched(curve, 1 / factor) if joins(curve) else curve for curve in cluster.collectives)
    return replace(cluster, levels=levels, collectives=curves)


def _stretched(curve: CollectiveCurve, factor: float) -> CollectiveCurve:
    """Return the curve with the seconds above those of its smallest message multiplied by `factor`."""
    start = min((sample.seconds for sample in curve.samples), default=0.0)
    samples = tuple(
        Sample(sample.shape, start + (sample.seconds - start) * factor, sample.spread) for sample in curve.samples
    )
    return replace(curve, samples=samples)


def _times(factor: float) -> str:
    words = {0.1: "a tenth of", 0.25: "a quarter of", 4.0: "four times", 10.0: "ten times"}
    return words[factor]


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
