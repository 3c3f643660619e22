"""Bytes, seconds and rates, as people read them. Inside Shardwise values are plain bytes, seconds, per second."""

from __future__ import annotations

import re

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


_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{letter}{end}": base ** (n + 1) for n, letter in enumerate("KMGT") for end, base in _ENDS},
}


def parse_bytes(text: str) -> int:
    """'40GiB' -> 42949672960, '40GB' -> 40000000000, '1024' -> 1024. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and next((unit for unit in _UNITS if unit.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size in bytes")
    return int(float(match[1]) * _UNITS[unit] + 0.5)
