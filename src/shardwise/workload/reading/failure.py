"""One line about an error, for processes that do not have its traceback."""

from __future__ import annotations

import traceback


def where(error: Exception) -> str:
    """Format an error and the place that raised it in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({frame.filename}, line {frame.lineno})"
