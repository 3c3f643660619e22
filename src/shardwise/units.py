"""Parsing of numbers as people write them, and formatting of bytes, seconds and rates for people.

Inside Shardwise values are plain numbers of bytes, seconds, and units per second.
"""

from __future__ import annotations

import math
import re

LARGEST_WHOLE = 2**63 - 1
"""Largest whole number that is accepted as input: signed 64-bit, which all file formats and torch can hold."""

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"-?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?")

_ENDS = (("iB", 1024), ("B", 1000), ("", 1000))


def format_bytes(value: float) -> str:
    """Format a number of bytes in binary multiples, as memory is sold and allocated: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(value: float) -> str:
    """Format a number of seconds in fitting units: 0.0123 -> '12.3 ms', 75 -> '1 min 15 s'."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_rate(value: float) -> str:
    """Format a rate per second without its unit: 1234.5 -> '1,234'; rates below 100 keep one decimal."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def format_bits(bandwidth: float) -> str:
    """Format a bandwidth in bytes per second in bits per second, as links are sold: 1.25e9 -> '10 Gb/s'."""
    bits = bandwidth * 8
    for unit, size in (("Tb/s", 1e12), ("Gb/s", 1e9), ("Mb/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits:.3g} b/s"


def format_share(value: float) -> str:
    """Format a fraction as whole percent: 0.123 -> '12%'."""
    return f"{value * 100:.0f}%"


def parse_whole(text: str, most: int = LARGEST_WHOLE) -> int:
    """Parse a whole number in ASCII digits from -`most` to `most`: '12', '-3'; not '+3', '03', '1_000' or '1e3'.

    Raises:
        ValueError: the text is not such a number.
    """
    if not _WHOLE.fullmatch(text) or abs(int(text)) > most:
        raise ValueError(f"{text!r} is not a whole number of at most {most}")
    return int(text)


def parse_number(text: str) -> float:
    """Parse a finite number in ASCII digits: '12', '0.5', '-1e-3'; not 'nan', 'inf', '1_000' or '1e999'.

    Raises:
        ValueError: the text is not such a number.
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value + 0.0  # -0.0 becomes 0.0


_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{letter}{end}": base ** (n + 1) for n, letter in enumerate("KMGT") for end, base in _ENDS},
}


def parse_bytes(text: str) -> int:
    """Parse a size in bytes: '40GiB' -> 42949672960, '40GB' -> 40000000000, '1024' -> 1024. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = match and next((unit for unit in _UNITS if unit.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size in bytes")
    size = int(float(match[1]) * _UNITS[unit] + 0.5)
    if size > LARGEST_WHOLE:
        raise ValueError(f"{text!r} is more than a file or a memory can have")
    return size
