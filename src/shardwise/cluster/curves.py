"""Seconds between the points that were measured.

    memory, collectives      one number of bytes. Between two points a straight line in logarithms; below the first its
                             seconds, for what is smaller still has to be started; above the last in proportion.
    matmul, attention,       shapes of several sizes. Seconds are start + work / rate, times how much longer the
    convolution              nearest points took than that, weighted by their distance in logarithms (Shepard 1968;
                             Franke and Nielson 1980, "Smooth interpolation of large sets of scattered data")

Far from all points a shape has the efficiency of the nearest ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from shardwise.cluster.cluster import KernelCurve, Sample

NEAREST = 8
"""Points that a value between shapes is made of."""

STRETCH, WINDOWS = 0.2, 2.0
"""How far a doubling of the places, and of the window, of a convolution is, compared with one of its channels: code is
chosen by channels and window. Best of a few by leaving each measured point out in turn (median error 26%, with 1: 29%).
"""

SOFTEN = 0.01
"""Added to distances, which are in doublings of a size, so that none is zero."""

ANY = "aten.add"
"""What kernels that only move and combine values are timed like, by bytes, where they have no curve of their own."""


ROWS = "rows "
"""What the name of an elementwise operation begins with whose operands lie in short rows."""


class Line:
    """Seconds by one number: `Line(samples)(bytes)`."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        ordered = sorted((sample.shape[0], sample.seconds) for sample in samples)
        self._sizes = [float(size) for size, _ in ordered]
        self._seconds = [seconds for _, seconds in ordered]

    def __call__(self, size: float) -> float:
        """Seconds of so many bytes."""
        sizes, seconds = self._sizes, self._seconds
        if size <= sizes[0]:
            return seconds[0]
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1] if sizes[-1] else seconds[-1]
        above = bisect_right(sizes, size)
        (x0, x1), (y0, y1) = sizes[above - 1 : above + 1], seconds[above - 1 : above + 1]
        if not x0:
            return y0 + (y1 - y0) * size / x1
        return y0 * math.exp(math.log(y1 / y0) * math.log(size / x0) / math.log(x1 / x0))


class Surface:
    """Seconds by shape, of one kind of kernel: `Surface("matmul", samples)((1, 64, 64, 64))`."""

    def __init__(self, kind: str, samples: Sequence[Sample]) -> None:
        self._kind = kind
        works = [work(kind, sample.shape) for sample in samples]
        self._start = min(sample.seconds for sample in samples)
        self._rate = max(amount / sample.seconds for amount, sample in zip(works, samples, strict=True))
        self._points = [
            (_place(kind, sample.shape), math.log(sample.seconds / self._least(amount)))
            for amount, sample in zip(works, samples, strict=True)
        ]

    def __call__(self, shape: tuple[int, ...]) -> float:
        """Seconds of a kernel of that shape."""
        here = _place(self._kind, shape)
        near = sorted((math.dist(here, there), longer) for there, longer in self._points)[:NEAREST]
        radius = near[-1][0] + SOFTEN  # where a point stops to count, so that nothing jumps when it is passed
        weights = [((radius - distance) / (radius * (distance + SOFTEN))) ** 2 for distance, _ in near]
        longer = sum(weight * more for weight, (_, more) in zip(weights, near, strict=True)) / sum(weights)
        return self._least(work(self._kind, shape)) * math.exp(longer)

    def _least(self, amount: float) -> float:
        return self._start + amount / self._rate


def work(kind: str, shape: tuple[int, ...]) -> float:
    """Multiply-adds of a kernel of that shape, see `cluster.KernelCurve`; at least one."""
    if kind == "attention":
        batch, heads, queries, keys, size = shape
        return max(1.0, 2.0 * batch * heads * queries * keys * size)
    return max(1.0, float(math.prod(shape)))


def _place(kind: str, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Where a shape lies among others: logarithms of what its speed depends on."""
    if kind == "attention":
        batch, heads, queries, keys, size = shape
        return _logarithms(batch * heads, queries, keys, size)
    if kind == "convolution":
        batch, inputs, outputs, positions, window = shape
        places, *channels, side = _logarithms(batch * positions, inputs, outputs, window)
        return STRETCH * places, *channels, WINDOWS * side
    return _logarithms(*shape)


def _logarithms(*sizes: int) -> tuple[float, ...]:
    return tuple(math.log2(max(size, 1)) for size in sizes)


NATIVE = "native"
"""What the name of a convolution begins with that torch computes with code of its own, see `predict.counting`."""


def curve_name(kind: str, operation: str) -> str:
    """Which curve is that of an operation of a kernel of that kind: `cluster.KernelCurve.operation`."""
    if kind == "memory":
        return operation.removesuffix("_")
    if kind == "attention":
        return "dense" if operation.startswith("dense") else "causal"
    return NATIVE if operation.startswith(NATIVE) else ""


Key = tuple[str, str, str, bool]
"""Kind, operation, dtype, backward."""


class Curves:
    """The curves of a device by what they are of, for one number of workers with so many threads each.

    Attributes:
        workers, threads: see `cluster.KernelCurve`.
    """

    def __init__(self, curves: Iterable[KernelCurve], workers: int, threads: int) -> None:
        self.workers, self.threads = workers, threads
        self._samples: dict[Key, tuple[Sample, ...]] = {
            (curve.kind, curve.operation, curve.dtype, curve.backward): curve.samples
            for curve in curves
            if (curve.workers, curve.threads) == (workers, threads) and curve.samples
        }
        self._made: dict[Key, Line | Surface] = {}

    def moved(self, operation: str, dtype: str, size: float) -> float | None:
        """Seconds of a kernel that only moves and combines values, by bytes; None where none was measured.

        What has no curve of its own is timed like another operation in that dtype, or like itself in float32.
        """
        name = curve_name("memory", operation)
        plain = name.removeprefix(ROWS)
        names = (name, plain, ANY) if plain == name else (name, ROWS + ANY, plain, ANY)
        for key in ((each, kind) for kind in (dtype, "float32") for each in dict.fromkeys(names)):
            line = self._curve(("memory", *key, False))
            if isinstance(line, Line):
                return line(size)
        return None

    def computed(self, kind: str, operation: str, dtype: str, backward: bool, shape: tuple[int, ...]) -> float | None:
        """Seconds of a matrix product, attention or convolution; None where none was measured in that dtype."""
        name = curve_name(kind, operation)
        for named in dict.fromkeys((name, "" if name == NATIVE else name)):  # files of earlier versions lack some
            surface = self._curve((kind, named, dtype, backward)) or self._curve((kind, named, dtype, False))
            if isinstance(surface, Surface):
                return surface(shape)
        return None

    def _curve(self, key: Key) -> Line | Surface | None:
        if key not in self._made and key in self._samples:
            samples = self._samples[key]
            self._made[key] = Line(samples) if key[0] == "memory" else Surface(key[0], samples)
        return self._made.get(key)

    @property
    def measured(self) -> list[str]:
        """Kinds and dtypes that there are curves of, for people."""
        kinds = {(kind if kind != "attention" else f"{name} {kind}", dtype) for kind, name, dtype, _ in self._samples}
        return [f"{kind} in {dtype}" for kind, dtype in sorted(kinds)]


def situations(curves: Iterable[KernelCurve]) -> list[tuple[int, int]]:
    """(workers, threads) that were measured, ascending."""
    return sorted({(curve.workers, curve.threads) for curve in curves if curve.samples})
