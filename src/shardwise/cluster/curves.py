"""Interpolate kernel and collective times between measured points.

    memory, collectives      one number of bytes. Between two points, linear in logarithms. Below the first point, its
                             seconds, because smaller kernels still pay the launch. Above the last, in proportion.
    matmul, attention,       shapes of several sizes. Seconds are start + work / rate, times the slowdown of the nearest
    convolution              points compared with that formula, weighted by their distance in logarithms (Shepard 1968;
                             Franke and Nielson 1980, "Smooth interpolation of large sets of scattered data")

Far from all points, a shape has the efficiency of the nearest ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from shardwise.cluster.cluster import KernelCurve, Sample

NEAREST = 8
"""Number of measured points that a value is interpolated from."""

STRETCH, WINDOWS = 0.2, 2.0
"""Weights of a doubling of the positions, and of the window, in the distance between convolutions; channels weigh 1.

Libraries choose a convolution's code by channels and window. The weights are the best of a few, found by leaving each
measured point out in turn (median error 26%; with weights of 1: 29%).
"""

SOFTEN = 0.01
"""Offset added to distances, which are in doublings of a size, so that none is zero."""

ANY = "aten.add"
"""Operation whose curve by bytes stands in for memory-bound kernels that have no curve of their own."""


ROWS = "rows "
"""Prefix in the names of elementwise operations whose operands lie in short rows."""


class Line:
    """Seconds as a function of one number: `Line(samples)(bytes)`."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        ordered = sorted((sample.shape[0], sample.seconds) for sample in samples)
        self._sizes = [float(size) for size, _ in ordered]
        self._seconds = [seconds for _, seconds in ordered]

    def __call__(self, size: float) -> float:
        """Return the seconds of a kernel or collective of `size` bytes."""
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
    """Seconds of one kind of kernel as a function of shape: `Surface("matmul", samples)((1, 64, 64, 64))`."""

    def __init__(self, kind: str, samples: Sequence[Sample]) -> None:
        self._kind = kind
        works = [work(kind, sample.shape) for sample in samples]
        self._start = min(sample.seconds for sample in samples)
        self._rate = max(amount / sample.seconds for amount, sample in zip(works, samples, strict=True))
        self._points = [
            (_position(kind, sample.shape), math.log(sample.seconds / self._least(amount)))
            for amount, sample in zip(works, samples, strict=True)
        ]

    def __call__(self, shape: tuple[int, ...]) -> float:
        """Return the seconds of a kernel of this shape."""
        here = _position(self._kind, shape)
        near = sorted((math.dist(here, there), longer) for there, longer in self._points)[:NEAREST]
        radius = near[-1][0] + SOFTEN  # the weight of a point reaches zero here, which keeps the surface continuous
        weights = [((radius - distance) / (radius * (distance + SOFTEN))) ** 2 for distance, _ in near]
        longer = sum(weight * more for weight, (_, more) in zip(weights, near, strict=True)) / sum(weights)
        return self._least(work(self._kind, shape)) * math.exp(longer)

    def _least(self, amount: float) -> float:
        return self._start + amount / self._rate


def work(kind: str, shape: tuple[int, ...]) -> float:
    """Return the multiply-adds of a kernel of this shape (see `cluster.KernelCurve`), at least one."""
    if kind == "attention":
        batch, heads, queries, keys, size = shape
        return max(1.0, 2.0 * batch * heads * queries * keys * size)
    return max(1.0, float(math.prod(shape)))


def _position(kind: str, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Map a shape to a point whose coordinates are the logarithms of the sizes that its speed depends on."""
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
"""Prefix in the names of convolutions that torch computes with its own code, see `predict.profile.op_counter`."""


def curve_name(kind: str, operation: str) -> str:
    """Return the name of the curve to use for an operation of this kind, as in `cluster.KernelCurve.operation`."""
    if kind == "memory":
        return operation.removesuffix("_")
    if kind == "attention":
        return "dense" if operation.startswith("dense") else "causal"
    return NATIVE if operation.startswith(NATIVE) else ""


Key = tuple[str, str, str, bool]
"""Key of a curve: (kind, operation, dtype, backward)."""


class Curves:
    """Curves of a device by kernel, for one number of workers and one number of threads per worker.

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
        """Return the seconds of a memory-bound kernel by bytes. Returns None if none was measured.

        An operation without a curve of its own uses that of another operation in its dtype, then its own in float32.
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
        """Return the seconds of a matmul, attention or convolution. Returns None if none was measured in this dtype."""
        name = curve_name(kind, operation)
        for named in dict.fromkeys((name, "" if name == NATIVE else name)):  # older files have no curve of native ones
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
        """Kinds and dtypes of the measured curves, worded for messages."""
        kinds = {(kind if kind != "attention" else f"{name} {kind}", dtype) for kind, name, dtype, _ in self._samples}
        return [f"{kind} in {dtype}" for kind, dtype in sorted(kinds)]


def situations(curves: Iterable[KernelCurve]) -> list[tuple[int, int]]:
    """Return the measured (workers, threads) pairs in ascending order."""
    return sorted({(curve.workers, curve.threads) for curve in curves if curve.samples})
