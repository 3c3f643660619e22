"""Profiles of models with many equal blocks, from those of two short ones: what the longer one has more is repeated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardwise.errors import WorkloadError
from shardwise.predict.profile import Parameter, Profile, Value

Places = Mapping[tuple[int, int], int]
"""(parameter of the longer profile, repetition) -> its place in the result."""


def repeated(short: Profile, longer: Profile, times: int) -> Profile:
    """See `Profile.repeated`."""
    starts = _starts([link.layer for link in short.links], [link.layer for link in longer.links])
    spots = _starts(_kinds(short), _kinds(longer))
    size, count = len(longer.links) - len(short.links), len(longer.parameters) - len(short.parameters)
    if times < 1 or size < 1 or count < 1 or not starts or not spots:
        raise WorkloadError(
            f"workload {short.name!r}: one of {len(longer.links)} parts is not one of {len(short.links)} and "
            "a block more, so that it cannot be repeated: build it whole"
        )
    spot = next((s for s in spots if any(_within(block, s, count) for block in longer.blocks)), spots[-1])
    first = min((link for p in longer.parameters[spot : spot + count] for link in p.links), default=starts[-1])
    start = first if first in starts else starts[-1]
    spread = _Spread(start, size, times)
    unit = longer.links[start : start + size]
    parameters, places = _parameters(longer, range(spot, spot + count), spread)
    return replace(
        longer,
        links=longer.links[:start] + unit * times + longer.links[start + size :],
        parameters=tuple(parameters),
        values=tuple(spread.values(longer.values)),
        blocks=_blocks(longer.blocks, places, range(spot, spot + count), times),
        ready=_ready(longer.ready, places, range(spot, spot + count), times),
        constants=short.constants + times * (longer.constants - short.constants),
        kept={},
    )


def _kinds(profile: Profile) -> list[object]:
    return [(p.shape, p.itemsize, p.trained, p.cut, p.summed, p.buffer) for p in profile.parameters]


def _starts(short: Sequence[object], longer: Sequence[object]) -> list[int]:
    """Where the part by which `longer` is longer may begin: several places, where parts around it are alike."""
    size = len(longer) - len(short)
    if size < 1:
        return []
    same = 0
    while same < len(short) and short[same] == longer[same]:
        same += 1
    behind = 0
    while behind < len(short) and short[-1 - behind] == longer[-1 - behind]:
        behind += 1
    return list(range(len(short) - behind, same + 1))


def _within(block: Sequence[int], start: int, count: int) -> bool:
    return all(start <= index < start + count for index in block)


def _parameters(longer: Profile, unit: range, spread: _Spread) -> tuple[list[Parameter], dict[tuple[int, int], int]]:
    found: list[Parameter] = []
    places: dict[tuple[int, int], int] = {}
    for index, parameter in enumerate(longer.parameters):
        if index == unit.start:
            for number in range(spread.times):
                for inside in unit:
                    each = longer.parameters[inside]
                    places[inside, number] = len(found)
                    name = f"{each.name}+{number}" if number else each.name
                    found.append(replace(each, name=name, links=tuple(spread.one(link, number) for link in each.links)))
        if index not in unit:
            places[index, 0] = len(found)
            found.append(replace(parameter, links=spread.all(parameter.links)))
    return found, places


@dataclass(frozen=True, slots=True)
class _Spread:
    """Numbers of links where `size` links from `start` on stand `times` times, and what is behind them moves."""

    start: int
    size: int
    times: int

    def one(self, link: int, number: int = 0) -> int:
        """Where a link of repetition `number` is, or one outside of the repeated part."""
        if link < self.start:
            return link
        return link + self.size * (number if link < self.start + self.size else self.times - 1)

    def all(self, links: Iterable[int]) -> tuple[int, ...]:
        """Where the users of something that belongs to no repetition are: all repetitions use it where one does."""
        found: set[int] = set()
        for link in links:
            inside = self.start <= link < self.start + self.size
            found.update(self.one(link, number) for number in range(self.times if inside else 1))
        return tuple(sorted(found))

    def values(self, values: Sequence[Value]) -> Iterable[Value]:
        """All values; those that the repeated part makes once for each repetition."""
        end = self.start + self.size
        for value in values:
            if self.start <= value.made < end:
                for number in range(self.times):
                    used, saved = (self._following(links, number) for links in (value.used, value.saved))
                    yield replace(value, made=self.one(value.made, number), used=used, saved=saved)
            elif self.start - self.size <= value.made < self.start:  # handed on by the block before
                used, saved = (tuple(self.one(link) for link in links) for links in (value.used, value.saved))
                yield replace(value, used=used, saved=saved)
            else:
                yield replace(value, made=self.one(value.made), used=self.all(value.used), saved=self.all(value.saved))

    def _following(self, links: Iterable[int], number: int) -> tuple[int, ...]:
        """Users of what repetition `number` makes: where the rest of the model was, the next repetition stands."""
        last = number == self.times - 1
        return tuple(
            self.one(link, number) if last or link < self.start else link + number * self.size for link in links
        )


def _blocks(blocks: Sequence[tuple[int, ...]], places: Places, unit: range, times: int) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for block in blocks:
        inside = any(index in unit for index in block)
        for number in range(times if inside else 1):
            found.append(tuple(places[index, number if index in unit else 0] for index in block))
    return tuple(found)


def _ready(ready: Sequence[int], places: Places, unit: range, times: int) -> tuple[int, ...]:
    inside = [index for index in ready if index in unit]
    found: list[int] = []
    for index in ready:
        if index not in unit:
            found.append(places[index, 0])
        elif index == inside[0]:  # the last repetition goes backwards first
            found += [places[each, number] for number in reversed(range(times)) for each in inside]
    return tuple(found)
