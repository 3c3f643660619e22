"""Profiles interpolated between few traced ones, for any microbatch size and degree of tensor parallelism.

Every shape, FLOP count and byte count of a microbatch of m samples on one of t tensor-parallel workers is

    a + b m + c / t + d m / t          and a kernel runs  a + b t  times (one copy for each worker)

for constants a to d. A handful of traced steps therefore gives the profiles of the hundreds of (tp, microbatch) pairs
of a search. Numbers that do not follow this rule (a kernel that changes with the size, tensors of a single sample that
need no copy, heads that no longer divide) show up when the finalists of a search are traced themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

from shardwise.errors import StrategyError, WorkloadError
from shardwise.options import FULL, NONE, SELECTIVE
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profile import Exchanged, LayerPass, Parameter, Profile, Segment, Value
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.profile.summary import ProfileSummary, summarize
from shardwise.strategy import Strategy

T = TypeVar("T")

SMALL, LARGE = 2, 4
"""Degrees of tensor parallelism, and samples of a microbatch, that are traced; other sizes are interpolated."""


class _Unlike(Exception):
    """Raised for two profiles that differ in more than numbers, so that there is no line through them."""


P = TypeVar("P", bound=Profile | ProfileSummary)


def between(first: P, second: P, at: float, repeats_at: float | None = None) -> P | None:
    """Return the profile on the line through two others, by linear interpolation or extrapolation of all numbers.

    Returns None if the two differ in more than numbers. Equal kernels of a pass are merged if the two have different
    numbers of kernels. Names, batch size and other fields that are not interpolated are those of `first`.

    Args:
        first: profile at position 0 of the line.
        second: profile of the same workload at position 1.
        at: position on the line.
        repeats_at: position on the line for the number of times that kernels run; None selects `at`.
    """
    try:
        line = _Line(at, at if repeats_at is None else repeats_at)
        nothing = Memo()  # shared by both, so that it is not interpolated
        found = line.of(replace(first, memo=nothing), replace(second, memo=nothing, **_same(first)))
    except _Unlike:
        return None
    return replace(found, memo=Memo())


def _same(profile: Profile | ProfileSummary) -> dict[str, Any]:
    """Return the fields that are not interpolated but taken from a profile."""
    if isinstance(profile, ProfileSummary):
        return {"tp": profile.tp}
    return {name: getattr(profile, name) for name in ("tp", "microbatch", "batch_size", "notes", "ready", "blocks")}


@dataclass(slots=True)
class _Line:
    """Linear interpolation a + (b - a) at of every number in two trees of equal structure."""

    at: float
    repeats_at: float
    known: dict[tuple[int, int], Any] = field(default_factory=dict)

    def of(self, a: T, b: T) -> T:
        """Return the interpolated tree, cached for each pair. Raises _Unlike if they differ in more than numbers."""
        if a is b:
            return a
        key = (id(a), id(b))
        if key not in self.known:
            self.known[key] = self._made(a, b), a, b  # keep both alive: their ids are the key
        found: T = self.known[key][0]
        return found

    def _made(self, a: Any, b: Any) -> Any:
        if type(a) is not type(b):
            raise _Unlike
        if isinstance(a, bool | str) or a is None:
            if a != b:
                raise _Unlike
            return a
        if isinstance(a, int):
            return self._number(a, b)
        if isinstance(a, float):
            return max(0.0, a + (b - a) * self.at)
        if isinstance(a, tuple):
            if len(a) != len(b):
                raise _Unlike
            return tuple(self.of(x, y) for x, y in zip(a, b, strict=True))
        if is_dataclass(a) and not isinstance(a, type):
            return self._dataclass(a, b)
        if a != b:
            raise _Unlike
        return a

    def _dataclass(self, a: Any, b: Any) -> Any:
        if isinstance(a, Value):
            return self._value(a, b)
        if isinstance(a, Segment):
            return Segment(self.of(a.layer, b.layer), self._number(a.message, b.message))
        if isinstance(a, Parameter) and a == b:
            return a
        if isinstance(a, Kernel):
            return self._kernel(a, b)
        if isinstance(a, LayerPass):
            first, second = a.kernels, b.kernels
            if len(first) != len(second):
                first, second = _merged(first), _merged(second)
            return LayerPass(self.of(first, second), self.of(a.exchanges, b.exchanges))
        if isinstance(a, Exchanged) and len(a.beside) != len(b.beside):
            a, b = (replace(each, beside=_merged(each.beside)) for each in (a, b))
        return self._fields(a, b)

    def _number(self, a: int, b: int) -> int:
        return a if a == b else max(0, round(a + (b - a) * self.at))

    def _value(self, a: Value, b: Value) -> Value:
        """Interpolate a value. Written out for speed: a deep model has about as many values as segments."""
        if (a.made, a.used, a.saved, a.grad) != (b.made, b.used, b.saved, b.grad):
            raise _Unlike
        if a.message == b.message and a.held == b.held:
            return a
        return Value(self._number(a.message, b.message), self._number(a.held, b.held), a.made, a.used, a.saved, a.grad)

    def _kernel(self, a: Kernel, b: Kernel) -> Kernel:
        """Interpolate a kernel. Written out for speed: most objects of a profile are kernels."""
        names, others = (a.operation, a.kind, a.dtype, a.backward, a.when), (b.operation, b.kind, b.dtype)
        if names != (*others, b.backward, b.when) or len(a.shape) != len(b.shape):
            raise _Unlike
        at = self.at
        return Kernel(
            a.operation,
            a.kind,
            a.dtype,
            max(0.0, a.flops + (b.flops - a.flops) * at),
            max(0.0, a.bytes + (b.bytes - a.bytes) * at),
            tuple(map(self._number, a.shape, b.shape)),
            a.backward,
            max(1, round(a.count + (b.count - a.count) * self.repeats_at)),
            a.when,
        )

    def _fields(self, a: Any, b: Any) -> Any:
        values = {each.name: self.of(getattr(a, each.name), getattr(b, each.name)) for each in fields(a)}
        return replace(a, **values)


def _merged(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Merge equal kernels into one whose count is the sum of theirs."""
    counts: dict[Kernel, int] = {}
    for kernel in kernels:
        alone = replace(kernel, count=1)
        counts[alone] = counts.get(alone, 0) + kernel.count
    return tuple(replace(kernel, count=count) for kernel, count in counts.items())


class ScaledProfiles:
    """Source of profiles like `Profiles`, which interpolates between few traced ones.

    Args:
        traced: source of the traced profiles at the corners.
    """

    def __init__(self, traced: ProfileSource) -> None:
        self.traced = traced
        self._corners: dict[tuple[Any, ...], Profile] = {}
        self._profiles = _Plane(self._corner, _for_microbatch)
        self._summaries = _Plane(lambda *corner: summarize(self._corner(*corner)), _for_degree)

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return the profile by which a search ranks a strategy. Raises as `Profiles.of` does."""
        return self._profiles.at(*self._where(strategy, batch_size))

    def summary(self, strategy: Strategy) -> ProfileSummary:
        """Return the summary of the profile from which bounds are computed. Raises as `Profiles.of` does."""
        return self._summaries.at(*self._where(strategy))

    def one(self) -> Profile:
        """Return a traced profile for a single worker, with some size of microbatch."""
        return self._corner(Strategy(), 1, SMALL)

    def _where(self, strategy: Strategy, batch_size: int = 0) -> tuple[Strategy, int]:
        size = batch_size or self.traced.workload.batch_size
        settled = strategy.for_batch(size)
        return settled, size // settled.replicas // settled.microbatches

    def _corner(self, strategy: Strategy, tp: int, samples: int) -> Profile:
        key = (tp, strategy.sp if tp > 1 else 0, samples, strategy.precision, *strategy.kernel_options)
        if key not in self._corners:
            sp = strategy.sp if tp > 1 else 0
            recompute = NONE if strategy.gathers_again or not sp else FULL
            if strategy.compiled == "rest":
                recompute = SELECTIVE
            alone = Strategy(
                tp=tp,
                sp=sp,
                precision=strategy.precision,
                microbatches=1,
                compile=strategy.compile,
                loss_pieces=strategy.loss_pieces,
                recompute=recompute,
            )
            if strategy.schedule == "zero-bubble":
                alone = alone.with_(pp=2, schedule="zero-bubble")
            self._corners[key] = replace(
                self.traced.of(alone, samples), batch_size=self.traced.workload.batch_size, memo=Memo()
            )
        return self._corners[key]


class _Plane(Generic[P]):
    """Profiles for all (tp, samples), interpolated between traced ones at the corners.

    Args:
        corner: (strategy, tp, samples) -> the traced profile.
        named: (profile, tp, samples) -> the profile with its fields set to these sizes.
    """

    def __init__(self, corner: Callable[[Strategy, int, int], P], named: Callable[[P, int, int], P]) -> None:
        self._corner, self._named = corner, named
        self._known: dict[tuple[Any, ...], P] = {}

    def at(self, strategy: Strategy, samples: int) -> P:
        """Return the profile for `samples` samples and a strategy's tp, sp, precision and schedule."""
        tp = strategy.tp
        if tp <= SMALL or tp == LARGE:
            return self._of_samples(strategy, tp, samples)
        key = self._key(strategy, tp, samples)
        if key not in self._known:
            self._known[key] = self._along_degrees(strategy, samples)
        return self._known[key]

    def _along_degrees(self, strategy: Strategy, samples: int) -> P:
        where = (1 / strategy.tp - 1 / SMALL) / (1 / LARGE - 1 / SMALL)
        repeats = (strategy.tp - SMALL) / (LARGE - SMALL)
        ends: list[P] = []
        for tp in (SMALL, LARGE):
            try:
                ends.append(self._of_samples(strategy, tp, samples))
            except (StrategyError, WorkloadError):
                break
        found = between(ends[0], ends[1], where, repeats) if len(ends) == 2 else None
        return self._exact_or(found, strategy, strategy.tp, samples)

    def _of_samples(self, strategy: Strategy, tp: int, samples: int) -> P:
        key = self._key(strategy, tp, samples)
        if key not in self._known:
            self._known[key] = self._along_samples(strategy, tp, samples)
        return self._known[key]

    def _along_samples(self, strategy: Strategy, tp: int, samples: int) -> P:
        alone = samples == 1 and (strategy.sp or _convolves(self._corner(strategy, tp, SMALL)))
        if samples in (SMALL, LARGE) or alone:  # gathers of a sequence have no copy then, convolutions other kernels
            return self._corner(strategy, tp, samples)
        first, second = self._corner(strategy, tp, SMALL), self._corner(strategy, tp, LARGE)
        found = between(first, second, (samples - SMALL) / (LARGE - SMALL))
        return self._exact_or(found, strategy, tp, samples)

    def _exact_or(self, found: P | None, strategy: Strategy, tp: int, samples: int) -> P:
        return self._corner(strategy, tp, samples) if found is None else self._named(found, tp, samples)

    @staticmethod
    def _key(strategy: Strategy, tp: int, samples: int) -> tuple[Any, ...]:
        return tp, strategy.sp if tp > 1 else 0, samples, strategy.precision, *strategy.kernel_options


def _convolves(profile: Profile | ProfileSummary) -> bool:
    """Return whether a profile has convolutions: for a single sample torch computes them with other kernels."""
    found = profile.segments if isinstance(profile, Profile) else profile.layers
    return any(kernel.kind == "convolution" for each in found for kernel in each.layer.forward.kernels)


def _for_microbatch(profile: Profile, tp: int, samples: int) -> Profile:
    return replace(profile, tp=tp, microbatch=samples)


def _for_degree(summary: ProfileSummary, tp: int, _: int) -> ProfileSummary:
    return replace(summary, tp=tp)
