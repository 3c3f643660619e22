"""Terminal that shows text: its width, and whether it has colours and block characters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

Segment = tuple[str, str]
"""Text and the name of its colour in COLOURS; an empty name: as the terminal has it."""

COLOURS = {"good": "32", "middle": "33", "bad": "31", "bold": "1", "faint": "2"}
"""Name -> parameter of the escape sequence (ECMA-48, select graphic rendition)."""

UNKNOWN_WIDTH = 100
"""Width in characters of text that goes to a file or a pipe."""

_BLOCKS = "█▁"


@dataclass(frozen=True, slots=True)
class Terminal:
    """Place where a reader sees a text.

    Attributes:
        live: whether text can be replaced by new text in its place.
        width: largest number of characters in a line.
        colour: whether escape sequences for colours are understood.
        blocks: whether block characters can be shown; else ASCII alone.
    """

    live: bool = False
    width: int = UNKNOWN_WIDTH
    colour: bool = False
    blocks: bool = True

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] = os.environ) -> Terminal:
        """Return the terminal behind a stream. NO_COLOR and TERM=dumb are respected."""
        live = stream.isatty() and environment.get("TERM") != "dumb"
        return cls(
            live=live,
            width=shutil.get_terminal_size((UNKNOWN_WIDTH, 24)).columns if stream.isatty() else UNKNOWN_WIDTH,
            colour=live and not environment.get("NO_COLOR"),
            blocks=_can_write(stream, _BLOCKS),
        )

    def line(self, segments: Sequence[Segment]) -> str:
        """Return one line of at most `width` characters."""
        left, parts = self.width, []
        for text, colour in segments:
            shown = text[:left]
            left -= len(shown)
            parts.append(f"\x1b[{COLOURS[colour]}m{shown}\x1b[0m" if self.colour and colour and shown else shown)
        return "".join(parts)


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def in_place_of(lines: int) -> str:
    """Return the escape sequence that removes the last `lines` lines, so that new ones take their place."""
    return f"\x1b[{lines}F\x1b[J" if lines else ""
