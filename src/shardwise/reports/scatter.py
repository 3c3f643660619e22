"""Scatter plots of predicted against measured values as SVG: logarithmic axes with the diagonal, in panels.

The SVG is written without a plotting library. Numbers are rounded, so that the same document gives the same file on
every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

Point = tuple[float, float]
"""Pair (measured, predicted), both positive."""

COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#444444",
    "#3a8f7b",
    "#a05195",
    "#6b8e23",
    "#b8860b",
    "#4169e1",
)
"""Colours of the series in their order; further series start again from the first."""

BAND = 0.1
"""Relative error that the grey band around the diagonal shows."""

SPACE, FOOT, HEAD = 62, 44, 30
"""Pixels left of, below and above the square of a panel."""

LEGEND_ROW = 17
"""Pixels of one line of the legend."""

NARROW = 1.0
"""Decades below which an axis is short enough to get more labels."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One square of a plot.

    Attributes:
        title: text above the square.
        series: map from name to points; the name decides the colour and, with several series, stands in the legend.
    """

    title: str
    series: Mapping[str, Sequence[Point]]


def scatter(
    panels: Sequence[Panel],
    *,
    label: Callable[[float], str],
    axes: tuple[str, str] = ("measured", "predicted"),
    columns: int = 1,
    side: int = 420,
) -> str:
    """Draw panels in rows as an SVG document.

    Args:
        panels: panels with at least one point each.
        label: formats a value of an axis as its label.
        axes: names of the horizontal and the vertical axis.
        columns: number of panels in a row.
        side: pixels of a panel's square.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    legend = names if any(len(panel.series) > 1 for panel in panels) else []
    width, height = side + SPACE + 14, side + HEAD + FOOT
    rows = ceil(len(panels) / columns)
    whole = (columns * width + (220 if legend else 0), max(rows * height, HEAD + len(legend) * LEGEND_ROW))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole[0]}" height="{whole[1]}" '
        f'viewBox="0 0 {whole[0]} {whole[1]}" font-family="sans-serif" font-size="11">',
        f'<rect width="{whole[0]}" height="{whole[1]}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        inside = "\n".join(_panel(panel, colours, label, axes, side))
        parts.append(f'<g transform="translate({column * width + SPACE} {row * height + HEAD})">\n{inside}\n</g>')
    parts += _legend(legend, colours, columns * width + 6)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    panel: Panel, colours: Mapping[str, str], label: Callable[[float], str], axes: tuple[str, str], side: int
) -> list[str]:
    values = [value for points in panel.series.values() for point in points for value in point]
    low, high = _range(min(values), max(values))

    def at(value: float) -> float:
        return side * (log10(value) - low) / (high - low)

    shift = side * log10(1 + BAND) / (high - low)
    band = f"0,{side - shift:.1f} 0,{side} {shift:.1f},{side} {side},{shift:.1f} {side},0 {side - shift:.1f},0"
    parts = [
        f'<text x="0" y="-10" font-size="13">{escape(panel.title)}</text>',
        f'<polygon points="{band}" fill="#ececec"/>',
        f'<path d="M0 {side}L{side} 0" stroke="#999"/>',
        f'<rect width="{side}" height="{side}" fill="none" stroke="#666"/>',
    ]
    for value in _ticks(low, high):
        x, text = at(value), escape(label(value))
        parts.append(f'<path d="M{x:.1f} {side}v4M0 {side - x:.1f}h-4" stroke="#666"/>')
        parts.append(f'<text x="{x:.1f}" y="{side + 16}" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="-7" y="{side - x + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text x="{side / 2:.1f}" y="{side + 33}" text-anchor="middle">{escape(axes[0])}</text>')
    middle = f"-46 {side / 2:.1f}"
    parts.append(f'<text transform="translate({middle}) rotate(-90)" text-anchor="middle">{escape(axes[1])}</text>')
    for name, points in panel.series.items():
        dots = "".join(f"M{at(measured):.1f} {side - at(predicted):.1f}h0" for measured, predicted in points)
        parts.append(
            f'<path d="{dots}" stroke="{colours[name]}" stroke-width="4.5" stroke-linecap="round" '
            'stroke-opacity="0.55" fill="none"/>'
        )
    return parts


def _range(least: float, most: float) -> tuple[float, float]:
    """Return log10 of both ends of an axis with a margin, rounded to 1/20 so that rounding errors cannot move it."""
    low, high = floor(log10(least) * 20 - 1) / 20, ceil(log10(most) * 20 + 1) / 20
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Return the values with a label: powers of ten, on short axes also 2 and 5, on shorter ones more."""
    steps: tuple[float, ...] = (1, 2, 5) if high - low < 2.5 else (1,)
    if high - low < NARROW:
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8)
    found = [step * 10.0**power for power in range(floor(low), ceil(high) + 1) for step in steps]
    return [value for value in found if low <= log10(value) <= high]


def _legend(names: Sequence[str], colours: Mapping[str, str], left: int) -> list[str]:
    parts = []
    for place, name in enumerate(names):
        y = HEAD + place * LEGEND_ROW
        parts.append(f'<circle cx="{left}" cy="{y}" r="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{left + 10}" y="{y + 4}">{escape(name)}</text>')
    return parts
