"""Profiles of models with many equal layers, from the profile of the same model with few of them.

    layer 0 | layer 1 | layer 2 | layer 3        of which layers 1 and 2 are seen to be alike in everything
    layer 0 | layer 1 | layer 1 | layer 1 ...    | layer 2 | layer 3

What comes before and behind layers 1 and 2 (the ends of the model, and how the first and the last layer differ) stays
as it is. Stages are cut on the whole chain, as if all of it had been traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from shardwise.predict.kept import Kept
from shardwise.predict.profile import Parameter, Profile, Value


def deepened(short: Profile, layers: Sequence[str]) -> Profile | None:
    """The profile of a model with more layers, without `blocks`; None where two in the middle are not alike.

    Args:
        short: of the model with its first four layers.
        layers: how the names of the parameters of each layer begin, of all that the model has.
    """
    middle = _middle(short, layers)
    if middle is None or not middle.alike(short):
        return None
    return middle.deepened(short)


def _middle(short: Profile, layers: Sequence[str]) -> _Middle | None:
    """Where layers 1 and 2 lie."""
    starts, members = [], []
    for prefix in layers[:4]:
        own = [index for index, parameter in enumerate(short.parameters) if parameter.name.startswith(prefix)]
        if not own or own != list(range(own[0], own[-1] + 1)):
            return None
        starts.append(min(short.parameters[index].links[0] for index in own))
        members.append(range(own[0], own[-1] + 1))
    _, first, second, end = starts
    if not first < second < end or second - first != end - second or len(members[1]) != len(members[2]):
        return None
    return _Middle(tuple(layers), first, second - first, members[1], members[2])


@dataclass(frozen=True, slots=True)
class _Middle:
    """Layers 1 and 2 of a short profile.

    Attributes:
        layers: how names begin.
        first: link of layer 1.
        size: links of each.
        one, two: their parameters.
    """

    layers: tuple[str, ...]
    first: int
    size: int
    one: range
    two: range

    @property
    def second(self) -> int:
        """First link of layer 2."""
        return self.first + self.size

    @property
    def end(self) -> int:
        """First link behind layer 2."""
        return self.second + self.size

    @property
    def more(self) -> int:
        """Layers that are added."""
        return len(self.layers) - 4

    # ---- whether they are alike ---------------------------------------------------------------------------------

    def alike(self, short: Profile) -> bool:
        """Whether layer 2 is layer 1, moved, in everything that a profile says of them."""
        links = short.links
        if links[self.first : self.second] != links[self.second : self.end]:
            return False
        parameters = zip(self.one, self.two, strict=True)
        if any(self._moved(short.parameters[a]) != short.parameters[b] for a, b in parameters):
            return False
        outside = [p for n, p in enumerate(short.parameters) if n not in self.one and n not in self.two]
        if not all(self._the_same(parameter.links) for parameter in outside):
            return False
        return self._same_values(short.values) and self._same_order(short.ready)

    def _moved(self, parameter: Parameter) -> Parameter:
        name = self.layers[2] + parameter.name.removeprefix(self.layers[1])
        return replace(parameter, name=name, links=self._plus(parameter.links, self.size))

    def _plus(self, links: Iterable[int], distance: int) -> tuple[int, ...]:
        return tuple(link + distance for link in links)

    def _within(self, links: Iterable[int], first: int) -> list[int]:
        return [link - first for link in links if first <= link < first + self.size]

    def _the_same(self, links: Sequence[int]) -> bool:
        """Whether both use something from outside in the same way, or only layer 1 what the layer before hands it."""
        there = self._within(links, self.second)
        return not there or self._within(links, self.first) == there

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
        places = [[ready.index(index) for index in own if index in ready] for own in (self.one, self.two)]
        if any(sorted(own) != list(range(min(own, default=0), max(own, default=-1) + 1)) for own in places):
            return False
        orders = [[ready[place] - own[0] for place in sorted(at)] for at, own in zip(places, self._both, strict=True)]
        return orders[0] == orders[1] and (not places[0] or max(places[1]) + 1 == min(places[0]))

    @property
    def _both(self) -> tuple[range, range]:
        return self.one, self.two

    def _following(self, value: Value, distance: int) -> Value:
        """What a layer makes, so many links further on."""
        return replace(
            value,
            made=value.made + distance,
            used=self._plus(value.used, distance),
            saved=self._plus(value.saved, distance),
        )

    # ---- more of them -------------------------------------------------------------------------------------------

    def deepened(self, short: Profile) -> Profile:
        """With as many layers as there are names."""
        links = short.links
        return replace(
            short,
            links=links[: self.second] + links[self.first : self.second] * self.more + links[self.second :],
            parameters=tuple(self._parameters(short.parameters)),
            values=tuple(self._values(short.values)),
            ready=tuple(self._ready(short.ready)),
            blocks=(),
            kept=Kept(),
        )

    def _link(self, link: int) -> int:
        return link + (self.more * self.size if link >= self.second else 0)

    def _links(self, links: Sequence[int]) -> tuple[int, ...]:
        """Of something from outside: all copies use it where layer 2 does."""
        own = self._within(links, self.first) if self._within(links, self.second) else []
        copies = (self.second + number * self.size + link for number in range(self.more) for link in own)
        return tuple(sorted(chain(map(self._link, links), copies)))

    def _parameters(self, parameters: Sequence[Parameter]) -> Iterable[Parameter]:
        for index, parameter in enumerate(parameters):
            yield self._renamed(replace(parameter, links=self._links(parameter.links)))
            if index == self.one[-1]:
                for number in range(1, self.more + 1):
                    for each in self.one:
                        yield self._copy(parameters[each], number)

    def _renamed(self, parameter: Parameter) -> Parameter:
        for place in (2, 3):
            if parameter.name.startswith(self.layers[place]):
                rest = parameter.name.removeprefix(self.layers[place])
                return replace(parameter, name=self.layers[place + self.more] + rest)
        return parameter

    def _copy(self, parameter: Parameter, number: int) -> Parameter:
        name = self.layers[1 + number] + parameter.name.removeprefix(self.layers[1])
        return replace(parameter, name=name, links=self._plus(parameter.links, number * self.size))

    def _values(self, values: Sequence[Value]) -> Iterable[Value]:
        before = [value for value in values if value.made < self.first]
        one = [value for value in values if self.first <= value.made < self.second]
        behind = [value for value in values if value.made >= self.second]
        for value in before:
            yield replace(value, used=self._links(value.used), saved=self._links(value.saved))
        for number in range(self.more + 1):
            yield from (self._following(value, number * self.size) for value in one)
        yield from (self._following(value, self.more * self.size) for value in behind)

    def _ready(self, ready: Sequence[int]) -> Iterable[int]:
        """Gradients of the last layers are complete first."""
        count = len(self.one)
        own = [index for index in ready if index in self.one]
        for index in ready:
            if own and index == own[0]:
                for number in range(self.more, 0, -1):
                    yield from (each + number * count for each in own)
            yield index + (self.more * count if index > self.one[-1] else 0)
