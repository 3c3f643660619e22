"""From what a user writes to a workload: what converts, and one clear line for every mistake."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from shardwise.errors import DataError, WorkloadError
from shardwise.workload.load import load_workload, workload_parameters
from shardwise.workload.settings import convert, parameters_of
from shardwise.workload.workload import Workload

GOOD = """
from __future__ import annotations
from typing import TYPE_CHECKING
from shardwise import Workload

if TYPE_CHECKING:
    from nowhere import OnlyForCheckers


def make(layers: int = 2, rate: float = 0.1, kind: OnlyForCheckers = "a") -> Workload:
    name = f"{layers}-{rate}-{kind}"
    return Workload(name=name, model=len, dataset=[], inputs=len, loss=len, optimizer=len, batch_size=4)


def needs(width: int) -> Workload:
    return make(width)


def wrong():
    return 3


def fails():
    raise KeyError("first\\nsecond")


def incomplete():
    return Workload(name="x")


def refused():
    return make().__class__(
        name="x", model=len, dataset=[], inputs=len, loss=len, optimizer=len, batch_size=0
    )

number = 5
"""


RAISES = 1 + GOOD.splitlines().index('    raise KeyError("first\\nsecond")')


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    return path


def message(spec: str, settings: dict[str, Any] | None = None) -> str:
    with pytest.raises(WorkloadError) as caught:
        load_workload(spec, settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_file_with_settings(good: Path) -> None:
    workload = load_workload(f"{good}:make", {"layers": "5", "rate": "1e-3", "kind": "b"})
    assert isinstance(workload, Workload)
    assert workload.name == "5-0.001-b"
    assert load_workload(f"{good}:make", {"layers": 7}).name == "7-0.1-a"


def test_file_changed_between_loads(good: Path) -> None:
    load_workload(f"{good}:make")
    good.write_text(GOOD.replace("layers: int = 2", "layers: int = 30"))
    assert load_workload(f"{good}:make").name.startswith("30-")


def test_file_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_workload.py").write_text("NAME = 'beside'")
    text = GOOD.replace("name=name", "name=NAME") + "\nfrom neighbour_of_workload import NAME\n"
    (tmp_path / "mine.py").write_text(text)
    assert load_workload(f"{tmp_path / 'mine.py'}:make").name == "beside"


@pytest.mark.parametrize("spec", ["mine_here.py:make", "mine_here:make"])
def test_neighbours_shadow_no_installed_package(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "twice_there.py").write_text("NAME = 'installed'")
    (tmp_path / "twice_there.py").write_text("NAME = 'beside'")
    (tmp_path / "mine_here.py").write_text(GOOD.replace("name=name", "name=NAME") + "\nfrom twice_there import NAME\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    for name in ("mine_here", "twice_there"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert load_workload(spec).name == "installed"
    sys.modules.pop("twice_there")


def test_module(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good.parent / "package_of_workloads").mkdir()
    (good.parent / "package_of_workloads" / "inner.py").write_text(GOOD)
    monkeypatch.chdir(good.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_workload("package_of_workloads.inner:make").name == "2-0.1-a"
    assert "package_of_workloads.iner" in message("package_of_workloads.iner:make")


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("mak", ["no function 'mak'", "make, needs", "did you mean 'make'"]),
        ("number", ["'number'", "a value of type int", "not a function"]),
        ("wrong", ["returned a value of type int", "not a Workload"]),
        ("fails", ["cannot be built: KeyError: 'first\\nsecond'", f"good.py, line {RAISES}"]),
        ("incomplete", ["cannot be built: TypeError", "model"]),
        ("refused", ["batch_size=0: must be 1 or more"]),
        ("needs", ["needs a value for 'width'", "--set width=VALUE"]),
    ],
)
def test_function_errors(good: Path, function: str, parts: list[str]) -> None:
    text = message(f"{good}:{function}")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"layer": "3"}, ["no parameter 'layer'", "layers, rate, kind", "did you mean 'layers'"]),
        ({"layers": "3.5"}, ["layers=3.5", "whole number (int)"]),
        ({"rate": "fast"}, ["rate=fast", "number (float)"]),
    ],
)
def test_setting_errors(good: Path, settings: dict[str, str], parts: list[str]) -> None:
    text = message(f"{good}:make", settings)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("imag", ["unknown workload 'imag'", "image, language, medical", "did you mean 'image'"]),
        ("zzz", ["unknown workload 'zzz'", "path/to/file.py:function"]),
        (":make", ["':make'", "path/to/file.py:function"]),
        ("no_such_module_here:make", ["no module 'no_such_module_here'"]),
        ("json.nothing:make", ["no module 'json.nothing'"]),
        ("json:lodas", ["no function 'lodas' in json", "did you mean 'loads'"]),
        ("/nowhere/file.py:make", ["no file '/nowhere/file.py'"]),
    ],
)
def test_spec_errors(spec: str, parts: list[str]) -> None:
    text = message(spec)
    assert all(part in text for part in parts), text


def test_file_errors(good: Path) -> None:
    assert "did you mean" in message(f"{good.parent / 'goof.py'}:make")
    assert f"write {good}:FUNCTION" in message(str(good))
    assert "is a folder" in message(str(good.parent))


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("x = 1\nimport nowhere_at_all\n", ["ModuleNotFoundError", "nowhere_at_all", "broken.py, line 2"]),
        ("def f(:\n", ["SyntaxError", "broken.py, line 1"]),
        ("def f():\n    return 1 / 0\nf()\n", ["ZeroDivisionError", "broken.py, line 2"]),
        ("import json\n\njson.loads('{')\n", ["JSONDecodeError", "broken.py, line 3"]),
        ("import sys\nsys.exit('usage')\n", ["SystemExit: usage", "broken.py, line 2"]),
    ],
)
def test_import_errors(tmp_path: Path, code: str, parts: list[str]) -> None:
    path = tmp_path / "broken.py"
    path.write_text(code)
    text = message(f"{path}:make")
    assert all(part in text for part in ["broken.py cannot be imported", *parts]), text


def settable(annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("key", kind, default=default, annotation=annotation)


EMPTY = inspect.Parameter.empty


@pytest.mark.parametrize(
    ("text", "annotation", "default", "value"),
    [
        ("3", int, 1, 3),
        ("1e-4", float, 1.0, 1e-4),
        ("yes", bool, False, True),
        ("False", bool, True, False),
        ("3", str, "a", "3"),
        ("a/b", Path, None, Path("a/b")),
        ("a/b", Path | None, None, Path("a/b")),
        ("none", Path | None, None, None),
        ("None", Optional[int], 3, None),  # noqa: UP045
        ("4", int | None, None, 4),
        ("4", str | int, 1, 4),
        ("x", str | int, 1, "x"),
        ("b", Literal["a", "b"], "a", "b"),
        ("2", Literal[1, 2], 1, 2),
        ("b", Literal["a", "b"] | None, None, "b"),
        ("2", EMPTY, 7, 2),
        ("0.5", EMPTY, 7.0, 0.5),
        ("true", EMPTY, False, True),
        ("text", EMPTY, None, "text"),
        ("text", EMPTY, EMPTY, "text"),
    ],
)
def test_conversions(text: str, annotation: Any, default: Any, value: Any) -> None:
    converted = convert(text, settable(annotation, default))
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "parts"),
    [
        ("1.5", int, ["key=1.5", "int"]),
        ("maybe", bool, ["key=maybe", "true or false"]),
        ("x", int | None, ["key=x", "whole number (int) or none"]),
        ("vot", Literal["vit", "resnet"], ["key=vot", "vit or resnet", "did you mean 'vit'"]),
        ("1", dict, ["key=1", "dict", "cannot be set from text"]),
        ("1", list[int] | None, ["key=1", "cannot be set from text"]),
    ],
)
def test_conversion_errors(text: str, annotation: Any, parts: list[str]) -> None:
    with pytest.raises(WorkloadError) as caught:
        convert(text, settable(annotation))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_parameters(good: Path) -> None:
    parameters = workload_parameters(f"{good}:make")
    assert list(parameters) == ["layers", "rate", "kind"]
    assert parameters["layers"].annotation is int
    assert parameters["kind"].annotation is EMPTY
    assert workload_parameters("image")["model"].annotation == Literal["vit", "resnet"]

    def rest(a: int, *more: int, b: int = 2, **others: int) -> None: ...

    assert list(parameters_of(rest)) == ["a", "b"]


def test_recipe_parameter_errors() -> None:
    assert "did you mean 'vit'" in message("image", {"model": "vitt"})
    assert "hidden=30: use 28 or 32, a multiple of 4" in message("image", {"hidden": "30"})
    assert "hidden=36: use 32 or 40, a multiple of heads=8" in message("image", {"hidden": "36", "heads": "8"})
    assert "patch=4: levels=3 leave a single voxel" in message("medical", {"patch": "4"})
    assert "did you mean 'heads'" in message("language", {"head": "2"})
    assert "patch=10: use 8 or 12" in message("medical", {"patch": "10"})
    assert "batch_size=0" in message("image", {"batch_size": "0"})
    assert "batch_size=0" in message("language", {"batch_size": "0"})


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sys.modules["importlib.util"].find_spec
    missing = ("sklearn", "nilearn", "PIL")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in missing else real(name, *rest))
    assert "scikit-learn is not installed" in message("image")
    assert "pip install 'shardwise[image]'" in message("image")
    assert "pip install 'shardwise[image]'" in message("image", {"data": "somewhere"})
    assert "pip install 'shardwise[medical]'" in message("medical")


def test_missing_data_is_a_data_error() -> None:
    for recipe in ("image", "medical", "language"):
        with pytest.raises(DataError, match="data=/nowhere/at/all: there is no such"):
            load_workload(recipe, {"data": "/nowhere/at/all"})
