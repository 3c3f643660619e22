"""The reason why a row is not predicted."""

from __future__ import annotations


class Lacking(ValueError):
    """A row that does not say what is needed, or says something unknown. The message says what."""
