"""Small pictures of numbers in one line of text: curves, bars of progress, and heat by rank."""

from __future__ import annotations

from collections.abc import Sequence

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
"""Eight levels from low to high, in blocks, and for terminals that have ASCII alone."""

HOTTEST = 2.0
"""Ratio to the median from which on a rank gets the highest level."""


def means(values: Sequence[float], most: int) -> list[float]:
    """Return at most `most` means of consecutive values, each of equally many but the last."""
    each = -(-len(values) // most) if values else 1
    parts = (values[begin : begin + each] for begin in range(0, len(values), each))
    return [sum(part) / len(part) for part in parts]


def sparkline(values: Sequence[float], width: int, levels: str = BLOCKS) -> str:
    """Draw a curve in at most `width` characters, from its smallest value to its largest; empty without values."""
    points = means(values, width)
    if not points:
        return ""
    low, high = min(points), max(points)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((point - low) * scale)] for point in points)


def progress_bar(share: float, width: int, *, blocks: bool = True) -> str:
    """Draw how much of something is done."""
    done = round(min(max(share, 0.0), 1.0) * width)
    full, empty = ("█", "░") if blocks else ("#", ".")
    return full * done + empty * (width - done)


def heat(values: Sequence[float], width: int) -> list[float]:
    """Return the ratio of each rank's value to the lower median, in at most `width` cells.

    If there are more ranks than cells, each cell is the largest ratio of equally many consecutive ranks.
    """
    middle = sorted(values)[(len(values) - 1) // 2]  # of two ranks the quicker, else the slower would be usual
    each = -(-len(values) // width)
    ratios = [value / middle if middle > 0 else 1.0 for value in values]
    return [max(ratios[begin : begin + each]) for begin in range(0, len(ratios), each)]


def heat_level(ratio: float, levels: str = BLOCKS) -> str:
    """Return the character of a rank's ratio to the median: the lowest up to 1, the highest from HOTTEST on."""
    top = len(levels) - 1
    return levels[min(top, max(0, round((ratio - 1) / (HOTTEST - 1) * top)))]
