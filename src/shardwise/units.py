"""Numbers as people write them; bytes, seconds and rates as people read them.

Inside Shardwise values are plain bytes, seconds, per second.
"""

from __future__ import annotations

import math
import re

LARGEST_WHOLE = 2**63 - 1
"""Of whole numbers that are read: what every file format and torch can hold."""

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"-?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?")

_ENDS = (("iB", 1024), ("B", 1000), ("", 1000))


def format_bytes(value: float) -> str:
    """1536 -> '1.5 KiB'. Binary multiples, as memory is sold and allocated."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(value: float) -> str:
    """0.0123 -> '12.3 ms'; 75 -> '1 min 15 s'."""
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
    """1234.5 -> '1,234' per second; small rates keep a digit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def format_bits(bandwidth: float) -> str:
    """1.25e9 -> '10 Gb/s': bytes per second as links are sold, in bits."""
    bits = bandwidth * 8
    for unit, size in (("Tb/s", 1e12), ("Gb/s", 1e9), ("Mb/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits:.3g} b/s"


def format_share(value: float) -> str:
    """0.123 -> '12%'."""
    return f"{value * 100:.0f}%"


def parse_whole(text: str, most: int = LARGEST_WHOLE) -> int:
    """Read a whole number in ASCII digits, at most `most` either way: '12', '-3'; no '+3', '03', '1_000' or '1e3'.

    Raises:
        ValueError: it is something else.
    """
    if not _WHOLE.fullmatch(text) or abs(int(text)) > most:
        raise ValueError(f"{text!r} is not a whole number of at most {most}")
    return int(text)


def parse_number(text: str) -> float:
    """Read a finite number in ASCII digits: '12', '0.5', '-1e-3'; no 'nan', 'inf', '1_000' or '1e999'.

    Raises:
        ValueError: it is something else.
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value + 0.0  # of zeros there is one


_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{letter}{end}": base ** (n + 1) for n, letter in enumerate("KMGT") for end, base in _ENDS},
}


def parse_bytes(text: str) -> int:
    """'40GiB' -> 42949672960, '40GB' -> 40000000000, '1024' -> 1024. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = match and next((unit for unit in _UNITS if unit.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size in bytes")
    size = int(float(match[1]) * _UNITS[unit] + 0.5)
    if size > LARGEST_WHOLE:
        raise ValueError(f"{text!r} is more than a file or a memory can have")
    return size
