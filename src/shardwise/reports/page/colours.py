"""Colours that colour-blind readers can tell apart (Okabe and Ito 2008), by what they stand for."""

from __future__ import annotations

from collections.abc import Mapping

PARTS: Mapping[str, str] = {
    "compute": "#0072B2",
    "optimizer": "#009E73",
    "host": "#8C8C8C",
    "dp": "#D55E00",
    "fsdp": "#E69F00",
    "tp": "#CC79A7",
    "pp": "#F0E442",
    "world": "#A05A2C",
    "communication": "#D55E00",
    "bubble": "#B8C4CE",
    "waiting": "#B8C4CE",
    "whole": "#56B4E9",
}
"""Colours of the parts of a step."""

PART_NAMES: Mapping[str, str] = {
    "compute": "computing",
    "optimizer": "optimizer",
    "host": "host, between operations",
    "dp": "exposed communication of dp",
    "fsdp": "exposed communication of fsdp",
    "tp": "exposed communication of tp",
    "pp": "exposed messages between stages",
    "world": "exposed communication of all",
    "communication": "exposed communication",
    "bubble": "bubble",
    "waiting": "waiting for other workers",
    "whole": "step, not divided",
}
"""Names of the parts of a step."""

HATCHED = ("bubble", "waiting", "host")
"""Parts in which a worker does nothing, drawn with a pattern."""

KINDS: Mapping[str, str] = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "backward of inputs": "#0072B2",
    "backward of weights": "#7A4FA3",
    "optimizer": "#009E73",
    "compute": "#0072B2",
    "other": "#8C8C8C",
    "waiting": "#B8C4CE",
}
"""Colours of the operations of a timeline that compute; communication has the colour of its axis."""

MEMORY: Mapping[str, str] = {
    "parameters": "#0072B2",
    "gradients": "#D55E00",
    "optimizer": "#009E73",
    "activations": "#E69F00",
    "temporary": "#F0E442",
    "process": "#8C8C8C",
    "fragments": "#B8C4CE",
    "context": "#5A5A5A",
    "rest": "#CC79A7",
}
"""Colours of the categories of memory."""

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FA3", "#8C8C8C", "#A05A2C", "#F0E442")
"""Colours of lines, one after the other."""


def series_colour(number: int) -> str:
    """Return the colour of line `number`, counted from 0."""
    return SERIES[number % len(SERIES)]
