"""Extension of a profile of a model with four layers to the same model with any number of equal layers.

    layer 0 | layer 1 | layer 2 | layer 3                      the traced profile; layers 1 and 2 must be equal
    layer 0 | layer 1 | layer 1 | ... | layer 2 | layer 3      the extended profile: layer 1 is copied

All before layer 1 and after layer 2 (the ends of the model, the first and the last layer) stays as it is. Stages are
cut on the extended chain of segments, as if all of it had been traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profile import Parameter, Profile, Value


def deepened(short: Profile, layers: Sequence[str]) -> Profile | None:
    """Extend a profile to all layers of a model, without `blocks`.

    Returns None if the two layers in the middle are not equal.

    Args:
        short: profile of the model with its first four layers only.
        layers: prefix of the parameter names of each layer of the whole model.
    """
    middle = _middle(short, layers)
    if middle is None or not middle.repeats(short):
        return None
    return middle.deepened(short)


def _middle(short: Profile, layers: Sequence[str]) -> _Middle | None:
    """Find the segments and parameters of layers 1 and 2.

    Returns None if the parameters of a layer are not contiguous, or the layers are not of one size and adjacent.
    """
    starts, members = [], []
    for prefix in layers[:4]:
        own = [index for index, parameter in enumerate(short.parameters) if parameter.name.startswith(prefix)]
        if not own or own != list(range(own[0], own[-1] + 1)):
            return None
        starts.append(min(short.parameters[index].segments[0] for index in own))
        members.append(range(own[0], own[-1] + 1))
    _, first, second, end = starts
    if not first < second < end or second - first != end - second or len(members[1]) != len(members[2]):
        return None
    return _Middle(tuple(layers), first, second - first, members[1], members[2])


@dataclass(frozen=True, slots=True)
class _Middle:
    """Position of layers 1 and 2 in the profile of a shortened model.

    Attributes:
        layers: prefix of the parameter names of each layer of the whole model.
        first: first segment of layer 1.
        size: number of segments of each of the two layers.
        one, two: indices of their parameters.
    """

    layers: tuple[str, ...]
    first: int
    size: int
    one: range
    two: range

    @property
    def second(self) -> int:
        """Return the first segment of layer 2."""
        return self.first + self.size

    @property
    def end(self) -> int:
        """Return the first segment after layer 2."""
        return self.second + self.size

    @property
    def more(self) -> int:
        """Return the number of layers to add."""
        return len(self.layers) - 4

    # ---- comparison ---------------------------------------------------------------------------------------------

    def repeats(self, short: Profile) -> bool:
        """Return whether layer 2 equals layer 1 in everything that a profile contains, up to its position."""
        segments = short.segments
        if segments[self.first : self.second] != segments[self.second : self.end]:
            return False
        if any(segment >= self.second for index in self.one for segment in short.parameters[index].segments):
            return False  # a step that passes through all layers more than once
        parameters = zip(self.one, self.two, strict=True)
        if any(self._moved(short.parameters[a]) != short.parameters[b] for a, b in parameters):
            return False
        outside = [p for n, p in enumerate(short.parameters) if n not in self.one and n not in self.two]
        if not all(self._the_same(parameter.segments) for parameter in outside):
            return False
        return self._same_values(short.values) and self._same_order(short.ready)

    def _moved(self, parameter: Parameter) -> Parameter:
        name = self.layers[2] + parameter.name.removeprefix(self.layers[1])
        return replace(parameter, name=name, segments=self._plus(parameter.segments, self.size))

    def _plus(self, segments: Iterable[int], distance: int) -> tuple[int, ...]:
        return tuple(segment + distance for segment in segments)

    def _within(self, segments: Iterable[int], first: int) -> list[int]:
        return [segment - first for segment in segments if first <= segment < first + self.size]

    def _the_same(self, segments: Sequence[int]) -> bool:
        """Return whether both layers use a value from outside alike, or only layer 1 does (the output of layer 0)."""
        there = self._within(segments, self.second)
        return not there or self._within(segments, self.first) == there

    def _same_values(self, values: Sequence[Value]) -> bool:
        one = [value for value in values if self.first <= value.made < self.second]
        two = [value for value in values if self.second <= value.made < self.end]
        if any(value.used[-1] >= self.end for value in one) or len(one) != len(two):
            return False
        if any(self._following(a, self.size) != b for a, b in zip(one, two, strict=True)):
            return False
        before = [value for value in values if value.made < self.first]
        return all(self._the_same(value.used) and self._the_same(value.saved) for value in before)

    def _same_order(self, ready: Sequence[int]) -> bool:
        positions = [[ready.index(index) for index in own if index in ready] for own in (self.one, self.two)]
        if any(sorted(own) != list(range(min(own, default=0), max(own, default=-1) + 1)) for own in positions):
            return False
        orders = [
            [ready[position] - own[0] for position in sorted(at)] for at, own in zip(positions, self._both, strict=True)
        ]
        return orders[0] == orders[1] and (not positions[0] or max(positions[1]) + 1 == min(positions[0]))

    @property
    def _both(self) -> tuple[range, range]:
        return self.one, self.two

    def _following(self, value: Value, distance: int) -> Value:
        """Return a value that a layer makes, moved by `distance` segments."""
        return replace(
            value,
            made=value.made + distance,
            used=self._plus(value.used, distance),
            saved=self._plus(value.saved, distance),
        )

    # ---- extension ----------------------------------------------------------------------------------------------

    def deepened(self, short: Profile) -> Profile:
        """Return the profile of the whole model: layer 1 is repeated until all of `layers` are there."""
        segments = short.segments
        return replace(
            short,
            segments=segments[: self.second] + segments[self.first : self.second] * self.more + segments[self.second :],
            parameters=tuple(self._parameters(short.parameters)),
            values=tuple(self._values(short.values)),
            ready=tuple(self._ready(short.ready)),
            blocks=(),
            memo=Memo(),
        )

    def _segment(self, segment: int) -> int:
        return segment + (self.more * self.size if segment >= self.second else 0)

    def _segments(self, segments: Sequence[int]) -> tuple[int, ...]:
        """Return the segments that use a value or parameter from outside of the middle, in the extended chain.

        If layer 2 uses it, so do all copies of layer 1.
        """
        own = self._within(segments, self.first) if self._within(segments, self.second) else []
        copies = (self.second + number * self.size + segment for number in range(self.more) for segment in own)
        return tuple(sorted(chain(map(self._segment, segments), copies)))

    def _parameters(self, parameters: Sequence[Parameter]) -> Iterable[Parameter]:
        for index, parameter in enumerate(parameters):
            yield self._renamed(replace(parameter, segments=self._segments(parameter.segments)))
            if index == self.one[-1]:
                for number in range(1, self.more + 1):
                    for each in self.one:
                        yield self._copy(parameters[each], number)

    def _renamed(self, parameter: Parameter) -> Parameter:
        for position in (2, 3):
            if parameter.name.startswith(self.layers[position]):
                rest = parameter.name.removeprefix(self.layers[position])
                return replace(parameter, name=self.layers[position + self.more] + rest)
        return parameter

    def _copy(self, parameter: Parameter, number: int) -> Parameter:
        name = self.layers[1 + number] + parameter.name.removeprefix(self.layers[1])
        return replace(parameter, name=name, segments=self._plus(parameter.segments, number * self.size))

    def _values(self, values: Sequence[Value]) -> Iterable[Value]:
        before = [value for value in values if value.made < self.first]
        one = [value for value in values if self.first <= value.made < self.second]
        behind = [value for value in values if value.made >= self.second]
        for value in before:
            yield replace(value, used=self._segments(value.used), saved=self._segments(value.saved))
        for number in range(self.more + 1):
            yield from (self._following(value, number * self.size) for value in one)
        yield from (self._following(value, self.more * self.size) for value in behind)

    def _ready(self, ready: Sequence[int]) -> Iterable[int]:
        """Yield parameters in the order in which their gradients become complete: those of the last layers first."""
        count = len(self.one)
        own = [index for index in ready if index in self.one]
        for index in ready:
            if own and index == own[0]:
                for number in range(self.more, 0, -1):
                    yield from (each + number * count for each in own)
            yield index + (self.more * count if index > self.one[-1] else 0)
