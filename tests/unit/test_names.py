"""Every class of the source has a name of its own."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import shardwise

SOURCE = Path(shardwise.__file__).parent

ALLOWED: dict[str, str] = {}
"""Name of a class that may stand more than once -> the reason."""


def repeated(folder: Path) -> dict[str, list[str]]:
    """Return the files in which each class name stands, for those that stand more than once."""
    files: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                files[node.name].append(f"{path.relative_to(folder)}:{node.lineno}")
    return {name: found for name, found in files.items() if len(found) > 1}


def test_each_class_name_stands_once() -> None:
    found = {name: files for name, files in repeated(SOURCE).items() if name not in ALLOWED}
    assert not found, f"these names stand for several classes, give each of them its own: {found}"


def test_a_name_is_allowed_only_while_it_stands_twice() -> None:
    assert set(ALLOWED) <= set(repeated(SOURCE))


@pytest.mark.parametrize("second", ["class Stage: ...", "def made():\n    class Stage: ..."])
def test_a_second_class_of_a_name_is_found(tmp_path: Path, second: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "one.py").write_text("class Stage: ...\nclass Other: ...")
    (tmp_path / "inner" / "two.py").write_text(second)
    assert set(repeated(tmp_path)) == {"Stage"}
