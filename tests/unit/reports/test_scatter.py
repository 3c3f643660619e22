"""Plots of points on logarithmic axes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from shardwise.reports.scatter import COLOURS, Panel, scatter


def plot(*panels: Panel, columns: int = 1) -> str:
    return scatter(panels, label=lambda value: f"{value:g}", columns=columns, side=100)


def dots(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", text)]


def test_exact_predictions_lie_on_the_diagonal() -> None:
    found = dots(plot(Panel("all", {"a": [(1.0, 1.0), (10.0, 10.0), (31.6, 31.6)]})))
    assert len(found) == 3
    assert all(abs(x + y - 100) < 0.11 for x, y in found)


def test_too_slow_a_prediction_lies_above_it() -> None:
    (slow_x, slow_y), (_, fast_y) = dots(plot(Panel("all", {"a": [(10.0, 20.0), (10.0, 5.0)]})))
    assert slow_y < 100 - slow_x < fast_y


def test_axes_have_round_labels() -> None:
    text = plot(Panel("all", {"a": [(0.01, 0.01), (100.0, 100.0)]}))
    assert re.findall(r'text-anchor="middle">([\d.]+)</text>', text) == ["0.01", "0.1", "1", "10", "100"]


def test_several_series_have_a_legend_and_colours() -> None:
    text = plot(Panel("all", {"a": [(1.0, 1.0)], "b & c": [(2.0, 2.0)]}))
    ElementTree.fromstring(text)
    assert "b &amp; c" in text
    assert text.count(COLOURS[1]) == 2


def test_panels_in_rows() -> None:
    panels = [Panel(str(number), {str(number): [(1.0, 2.0)]}) for number in range(3)]
    text = plot(*panels, columns=2)
    ElementTree.fromstring(text)
    places = re.findall(r'<g transform="translate\((\d+) (\d+)\)', text)
    assert len({x for x, _ in places}) == 2
    assert len({y for _, y in places}) == 2
