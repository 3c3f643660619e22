"""What a table of a cluster file may hold: every field with its unit, and one clear line where a file differs.

A table is described by field name -> Field; `read_table` checks one against its description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.errors import ClusterError, nearest


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number above zero.

    Attributes:
        unit: for people, for example `bytes per second`.
        least: smallest value; None: anything above zero.
        whole: no fraction.
        default: of a field that may be left out; ... where it may not.
    """

    unit: str
    least: float | None = None
    whole: bool = False
    default: Any = ...

    @property
    def expected(self) -> str:
        """What the field takes, for messages."""
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above 0' if self.least is None else f'from {self.least:g} on'} ({self.unit})"

    def read(self, value: Any) -> Any:
        """The value. Raises ValueError where it is not one of this field."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:  # nan is not
            raise ValueError
        if self.whole and not isinstance(value, int):
            raise ValueError
        if value <= 0 if self.least is None else value < self.least:
            raise ValueError
        return value if self.whole else float(value)


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is not empty, or one of `choices` where there are any."""

    unit: str
    choices: tuple[str, ...] = ()
    default: Any = ...

    @property
    def expected(self) -> str:
        """What the field takes, for messages."""
        return f"one of {', '.join(self.choices)}" if self.choices else f"a text ({self.unit})"

    def read(self, value: Any) -> str:
        """The value. Raises ValueError where it is not one of this field."""
        if not isinstance(value, str):
            raise ValueError
        if self.default is ... and (not value or not value.isprintable()):  # a name is shown on terminals
            raise ValueError
        if self.choices and value not in self.choices:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false."""

    default: Any = ...
    expected: str = "true or false"

    def read(self, value: Any) -> bool:
        """The value. Raises ValueError where it is not one of this field."""
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Part:
    """A table, or an array of tables, that the caller reads further."""

    expected: str
    kind: type = dict
    default: Any = ...

    def read(self, value: Any) -> Any:
        """The value. Raises ValueError where it is not one of this field."""
        if not isinstance(value, self.kind):
            raise ValueError
        return value


Field = Number | Text | Flag | Part


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file, for messages: `cluster.toml: devices.h100`."""

    file: str
    key: str = ""

    def __truediv__(self, key: str) -> Where:
        return Where(self.file, f"{self.key}.{key}" if self.key else key)

    def item(self, number: int) -> Where:
        """Entry `number` of an array."""
        return Where(self.file, f"{self.key}[{number}]")

    def error(self, problem: str) -> ClusterError:
        """What to raise about it."""
        return ClusterError(f"{self.file}: {self.key} {problem}" if self.key else f"{self.file}: {problem}")


def read_table(table: Any, fields: Mapping[str, Field], where: Where) -> dict[str, Any]:
    """The values of a table, those left out with their defaults.

    Raises:
        ClusterError: an unknown field, one that is missing, or one that is not what it must be.
    """
    if not isinstance(table, dict):
        raise where.error(f"= {show(table)}: must be a table")
    for name in table:
        if name not in fields:
            guess = nearest(name, fields)
            known = f"known are {', '.join(fields)}" if not guess else ""
            close = next((f" ({field.expected})" for key, field in fields.items() if f"{key!r}?" in guess), "")
            raise (where / name).error(f"is not known{guess}{close}{'; ' + known if known else ''}")
    return {name: read_field(table, name, field, where) for name, field in fields.items()}


def read_field(table: Mapping[str, Any], name: str, field: Field, where: Where) -> Any:
    """One value. Raises ClusterError where it is missing or is not what it must be."""
    if name not in table:
        if field.default is ...:
            raise (where / name).error(f"is missing: must be {field.expected}")
        return field.default
    try:
        return field.read(table[name])
    except ValueError:
        guess = nearest(table[name], field.choices) if isinstance(field, Text) and isinstance(table[name], str) else ""
        raise (where / name).error(f"= {show(table[name])}: must be {field.expected}{guess}") from None


def read_mapping(table: Any, field: Field, where: Where, keys: tuple[str, ...], what: str) -> dict[str, Any]:
    """A table whose keys are all of `keys`, which are `what`, and whose values are all of one kind.

    Raises:
        ClusterError: see `read_table`.
    """
    for name in table:
        if name not in keys:
            raise (where / name).error(f"is not known: {what} are {', '.join(keys)}{nearest(name, keys)}")
    return {name: read_field(table, name, field, where) for name in table}


def show(value: Any) -> str:
    """A value as it stands in the file, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 40 else f"{text[:37]}..."
