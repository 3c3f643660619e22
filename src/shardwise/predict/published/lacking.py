"""Error that says why a row of a table of runs is not predicted."""

from __future__ import annotations


class Lacking(ValueError):
    """Raised for a row that lacks something needed or says something unknown; the message names it."""
