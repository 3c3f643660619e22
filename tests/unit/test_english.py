"""Docstrings stand by themselves: their first line needs no name above it to be a sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OPENERS = ("Of ", "What ", "Whether ", "Those ", "With ", "The same ", "As ", "So many ", "That ", "How ")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and first line of each docstring, those below an assignment included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.lstrip().partition("\n")[0]


def unclear(text: str) -> list[str]:
    return [f"line {line}: {first}" for line, first in docstrings(ast.parse(text)) if first.startswith(OPENERS)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_stand_by_themselves(path: Path) -> None:
    assert unclear(path.read_text()) == []


def test_one_that_does_not_is_noticed() -> None:
    assert unclear('def bucket(size: int) -> int:\n    """Of so many MiB; 0: as usual."""\n') == [
        "line 2: Of so many MiB; 0: as usual."
    ]
