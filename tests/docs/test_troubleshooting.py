"""The lines that docs/troubleshooting.md quotes are said by the program, word for word."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from blocks import ROOT, blocks

PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 4
"""Characters of a piece of a message, below which it may be found anywhere."""

LINES = [line for block in blocks(PAGE) if block.language == "text" for line in block.code.splitlines()]


@cache
def said() -> frozenset[str]:
    """Return the constant pieces of all texts in the source."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(map(str.strip, node.value.splitlines()))
    return frozenset(piece for piece in found if len(piece) >= LEAST)


def unsaid(line: str) -> list[str]:
    """Return the words of a line that are in no piece which the source says and the line has."""
    covered = [False] * len(line)
    for piece in filter(line.__contains__, said()):
        for found in re.finditer(re.escape(piece), line):
            covered[found.start() : found.end()] = [True] * (found.end() - found.start())
    return [word[0] for word in re.finditer(r"[A-Za-z]{4,}", line) if not all(covered[word.start() : word.end()])]


@pytest.mark.parametrize("line", LINES)
def test_line_is_said(line: str) -> None:
    assert unsaid(line) == []


def test_a_line_that_nobody_says_is_noticed() -> None:
    assert unsaid("worker … was killed by thunder (out of memory?)") == ["thunder"]
    assert len(LINES) > 20
