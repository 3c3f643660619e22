"""Fields of the tables in a cluster file: the unit and range of each, and one clear message where a file differs.

A description maps field names to Fields; `read_table` checks a table against its description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.errors import ClusterError, nearest


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number, above zero unless `least` allows zero.

    Attributes:
        unit: unit to show in messages, for example `bytes per second`.
        least: smallest accepted value. None means anything above zero.
        whole: whether the number must be an integer.
        default: value of a field that is left out; ... means that the field is required.
    """

    unit: str
    least: float | None = None
    whole: bool = False
    default: Any = ...

    @property
    def expected(self) -> str:
        """Description of the values that the field accepts, for messages."""
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above 0' if self.least is None else f'from {self.least:g} on'} ({self.unit})"

    def read(self, value: Any) -> Any:
        """Return the value, as a float unless it must be whole. Raises ValueError if the field does not accept it."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:  # nor nan
            raise ValueError
        if self.whole and not isinstance(value, int):
            raise ValueError
        if value <= 0 if self.least is None else value < self.least:
            raise ValueError
        return value if self.whole else float(value)


@dataclass(frozen=True, slots=True)
class Text:
    """A string: one of `choices` if there are any, else printable and, if the field is required, not empty."""

    unit: str
    choices: tuple[str, ...] = ()
    default: Any = ...

    @property
    def expected(self) -> str:
        """Description of the values that the field accepts, for messages."""
        return f"one of {', '.join(self.choices)}" if self.choices else f"a text ({self.unit})"

    def read(self, value: Any) -> str:
        """Return the value. Raises ValueError if the field does not accept it."""
        if not isinstance(value, str):
            raise ValueError
        if self.default is ... and (not value or not value.isprintable()):  # names are shown on terminals
            raise ValueError
        if self.choices and value not in self.choices:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Flag:
    """A boolean, spelled true or false in TOML."""

    default: Any = ...
    expected: str = "true or false"

    def read(self, value: Any) -> bool:
        """Return the value. Raises ValueError if it is not a boolean."""
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class NestedTable:
    """A nested table, or an array of tables, that the caller reads further."""

    expected: str
    kind: type = dict
    default: Any = ...

    def read(self, value: Any) -> Any:
        """Return the value unchanged. Raises ValueError if it is not of type `kind`."""
        if not isinstance(value, self.kind):
            raise ValueError
        return value


Field = Number | Text | Flag | NestedTable


@dataclass(frozen=True, slots=True)
class Where:
    """A position in a file, for messages: `cluster.toml: devices.h100`."""

    file: str
    key: str = ""

    def __truediv__(self, key: str) -> Where:
        return Where(self.file, f"{self.key}.{key}" if self.key else key)

    def item(self, number: int) -> Where:
        """Return the position of entry `number` of an array."""
        return Where(self.file, f"{self.key}[{number}]")

    def error(self, problem: str) -> ClusterError:
        """Return the error to raise about a problem at this position."""
        return ClusterError(f"{self.file}: {self.key} {problem}" if self.key else f"{self.file}: {problem}")


def read_table(table: Any, fields: Mapping[str, Field], where: Where) -> dict[str, Any]:
    """Check a table against its fields and return its values, with defaults for the fields that are left out.

    Raises:
        ClusterError: a field is unknown, missing, or has a value that it does not accept.
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
    """Return the value of one field. Raises ClusterError if it is missing or not accepted."""
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
    """Read a table whose keys are all among `keys` and whose values are all of one kind; `what` names the keys.

    Raises:
        ClusterError: see `read_table`.
    """
    for name in table:
        if name not in keys:
            raise (where / name).error(f"is not known: {what} are {', '.join(keys)}{nearest(name, keys)}")
    return {name: read_field(table, name, field, where) for name in table}


def show(value: Any) -> str:
    """Return a value as it is spelled in the file, shortened to 40 characters."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 40 else f"{text[:37]}..."
