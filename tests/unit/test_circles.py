"""No two files of src/shardwise import each other, directly or around a circle; imports within functions count too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imported(tree: ast.Module) -> set[str]:
    """Return the files that a file imports; a package's own `__init__` counts only where a name of it is taken."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found.update(name if name in FILES else node.module for name in names)
    return found & FILES.keys()


def check(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_no_circles() -> None:
    check({name: imported(ast.parse(path.read_text())) for name, path in FILES.items()})


def test_a_circle_is_noticed() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"^(a -> b -> a|b -> a -> b)$"):
        check({"a": {"b"}, "b": {"a"}})
