"""The flow has one direction: every floor of src/shardwise imports only from the floors below it.

Read from the syntax tree, so that imports inside functions and for type checkers count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "shardwise"

VALUES = {"errors", "units", "options", "strategy", "collective", "files", "host_layers", "tomlfile", "version"}
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "options": {"errors", "units"},
    "strategy": {"errors", "units", "options"},
    "collective": {"errors", "units"},
    "files": {"errors", "units"},
    "host_layers": {"collective"},
    "tomlfile": {"errors", "units", "files"},
    "version": set(),
    "starting": set(),
    "launch": VALUES,
    "reports": VALUES,
    "cluster": VALUES,
    "workload": VALUES | {"cluster"},
    "splitting": VALUES,
    "parallel": VALUES | {"cluster", "workload", "launch", "splitting"},
    "predict": VALUES | {"cluster", "workload", "splitting", "parallel"},
    "planner": VALUES | {"cluster", "workload", "splitting", "parallel", "predict"},
    "run": VALUES | {"cluster", "workload", "splitting", "parallel", "predict", "launch", "reports"},
    "commands": VALUES
    | {"cluster", "workload", "splitting", "parallel", "predict", "planner", "launch", "reports", "run"},
    "api": VALUES
    | {"commands", "cluster", "workload", "splitting", "parallel", "predict", "planner", "launch", "reports", "run"},
    "compat": VALUES | {"workload", "launch"},
    "cli": VALUES | {"launch", "reports", "api", "starting"},
    "__main__": {"cli", "starting"},
    "__init__": VALUES | {"workload", "api"},
}
"""Module or folder -> the others that it may import."""


def floor_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that a module imports; `package` is where it lies, for imports that start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            if base == "shardwise":
                yield from (f"shardwise.{alias.name}" for alias in node.names)
            else:
                yield base


def floors_imported(path: Path) -> set[str]:
    package = ("shardwise", *path.relative_to(SOURCE).parent.parts)
    names = imported_modules(ast.parse(path.read_text()), package)
    return {name.split(".")[1] for name in names if name.startswith("shardwise.")}


MODULES = sorted(SOURCE.rglob("*.py"))


def test_every_module_has_a_floor() -> None:
    assert {floor_of(path) for path in MODULES} <= set(FLOORS)


def test_floors_have_no_circle() -> None:
    seen: set[str] = set()
    for floor, below in FLOORS.items():
        assert below <= seen, f"{floor} may import {below - seen}, which stand above it"
        seen.add(floor)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_from_below(path: Path) -> None:
    floor = floor_of(path)
    wrong = floors_imported(path) - FLOORS[floor] - {floor}
    assert not wrong, f"{path.relative_to(SOURCE)} is on floor {floor!r}, which does not import {sorted(wrong)}"


def test_reads_every_kind_of_import() -> None:
    source = (
        "import shardwise.a\nfrom shardwise.b import x\nfrom shardwise import c\nfrom . import d\nfrom ..e import y"
    )
    package = ("shardwise", "run")
    assert list(imported_modules(ast.parse(source), package)) == [
        "shardwise.a",
        "shardwise.b",
        "shardwise.c",
        "shardwise.run",
        "shardwise.e",
    ]
