"""Load the `Workload` that a user names: a recipe, `path/to/file.py:function`, `package.module:function`, a folder.

Every mistake is reported in one line. Importing this module does not import torch; loading a recipe does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from shardwise.errors import RequestError, WorkloadError, nearest
from shardwise.workload.settings import convert_settings, parameters_of
from shardwise.workload.workload import Workload

RECIPES = ("image", "language", "medical")
SIZES = "gpt:"
"""Prefix of a model given by its sizes: `gpt:layers=96,hidden=12288,heads=96`."""

_FORMS = (
    f"a recipe ({', '.join(RECIPES)}), {SIZES}layers=..., path/to/file.py:function, package.module:function or a "
    "folder with a Hugging Face config.json"
)


def load_workload(spec: str, settings: Mapping[str, Any] | None = None) -> Workload:
    """Build the workload that `spec` names, with `settings` for the parameters of its function.

    Args:
        spec: a recipe, `path/to/file.py:function`, `package.module:function` (the function returns a `Workload`), or
            a folder with a Hugging Face `config.json`, or `gpt:layers=96,hidden=12288,heads=96`.
        settings: map from a parameter to its value, or to text that is converted by the parameter's annotation or
            default.

    Raises:
        WorkloadError: the workload cannot be found, imported or built, or a setting is wrong.
        DataError: its data is missing or of the wrong kind.
    """
    with not_ending():
        return _load(spec, settings or {})


def _load(spec: str, settings: Mapping[str, Any]) -> Workload:
    function = _find_function(spec)
    arguments = convert_settings(f"workload {spec!r}", _parameters(spec, function), settings)
    try:
        workload = function(**arguments)
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"workload {spec!r} cannot be built: {_one_line(error)}{_place(error)}") from error
    if isinstance(workload, Workload):
        return workload
    if isinstance(workload, tuple) and len(workload) in (3, 4):
        from shardwise.workload.keras.compiled import is_keras_model, of_function

        if is_keras_model(workload[0]):
            return of_function(*workload)
    raise WorkloadError(
        f"{spec!r} returned {_kind(workload)}, not a Workload: the function must return a shardwise.Workload, or a "
        "compiled Keras model with its data: model, x, y"
    )


def workload_parameters(spec: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of the function that `spec` names, with resolved annotations. Raises WorkloadError."""
    with not_ending():
        return _parameters(spec, _find_function(spec))


def names_function(spec: str) -> bool:
    """Return whether a workload is a function of a file or module, whose code runs when it is loaded.

    Recipes, models by their sizes and Hugging Face folders run only the code of Shardwise and of installed packages.
    """
    return not (spec in RECIPES or _is_sizes(spec) or _is_folder(spec))


@contextlib.contextmanager
def not_ending() -> Iterator[None]:
    """Keep loaded code from ending this process: inside, `os._exit` raises SystemExit, as `sys.exit` does."""
    end, process = os._exit, os.getpid()

    def refuse(status: int) -> NoReturn:
        if os.getpid() != process:  # a child process that was forked inside may end
            end(status)
        raise SystemExit(status)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = end


def _parameters(spec: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return parameters_of(function)
    except (TypeError, ValueError) as error:
        raise WorkloadError(f"the parameters of {spec!r} cannot be read: {_one_line(error)}") from error


def _find_function(spec: str) -> Callable[..., Any]:
    if spec in RECIPES:
        return _function_of(_import_module(f"shardwise.workload.recipes.{spec}"), spec, spec)
    if _is_sizes(spec):
        return _of_sizes(spec)
    source, colon, name = spec.rpartition(":")
    if _is_folder(spec):
        module = _import_module("shardwise.workload.recipes.huggingface")
        found: Callable[..., Any] = module.huggingface_workload(Path(spec))
        return found
    if not colon:
        raise WorkloadError(_unknown(spec))
    if not source or not name:
        raise WorkloadError(f"workload {spec!r}: write path/to/file.py:function or package.module:function")
    is_file = source.endswith(".py") or os.sep in source
    module = _import_file(Path(source)) if is_file else _import_module_here(source)
    return _function_of(module, name, source)


def _is_sizes(spec: str) -> bool:
    return spec.startswith(SIZES) and not spec.removeprefix(SIZES).isidentifier()


def _is_folder(spec: str) -> bool:
    return os.path.isfile(os.path.join(spec, "config.json"))


def _of_sizes(spec: str) -> Callable[..., Any]:
    """Return the function of a model given by its sizes; the sizes become defaults that settings may override."""
    function = _import_module("shardwise.workload.recipes.gpt").gpt
    settings = {}
    for part in filter(None, spec.removeprefix(SIZES).split(",")):
        key, equals, value = (piece.strip(" ") for piece in part.partition("="))
        if not equals or not key or not value:
            raise WorkloadError(
                f"{part!r} in workload {spec!r} has no value: write {SIZES}layers=96,hidden=12288,heads=96"
            )
        if key in settings:
            raise WorkloadError(f"{key} is given twice in workload {spec!r}")
        settings[key] = value
    parameters = parameters_of(function)
    given = {name: parameter for name, parameter in parameters.items() if name in settings}
    known = given if len(given) == len(settings) else parameters  # missing sizes may still come with --set
    return partial(function, **convert_settings(f"workload {spec!r}", known, settings))


def _unknown(spec: str) -> str:
    path = Path(spec)
    if os.path.isfile(path):
        return f"workload {spec!r} names no function: write {spec}:FUNCTION"
    if os.path.isdir(path):
        return f"workload {spec!r} is a folder without a config.json: give {_FORMS}"
    return f"unknown workload {spec!r}: give {_FORMS}{nearest(spec, RECIPES)}"


def _function_of(module: ModuleType, name: str, source: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        found: Callable[..., Any] = function
        return found
    if hasattr(module, name):
        raise WorkloadError(f"{name!r} in {source} is {_kind(function)}, not a function that returns a Workload")
    known = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    listed = f"its functions are {', '.join(known)}" if known else "it has no functions"
    raise WorkloadError(f"no function {name!r} in {source}: {listed}{nearest(name, known)}")


def _import_module_here(name: str) -> ModuleType:
    """Import a module that is installed or lies in the working directory; installed ones take precedence."""
    _add_to_path(os.getcwd())
    return _import_module(name)


def _add_to_path(folder: str) -> None:
    """Append a folder to the import path, so that its modules never replace installed ones such as `torch`."""
    if folder not in sys.path:
        sys.path.append(folder)


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except RequestError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise WorkloadError(f"there is no module {error.name!r} to import {name!r} from") from None
        raise WorkloadError(f"{name} cannot be imported: {_one_line(error)}{_place(error)}") from error
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"{name} cannot be imported: {_one_line(error)}{_place(error)}") from error


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module, with its folder last on the import path, so that it can import its neighbours."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        there = f"{str(path)!r} is no regular file" if os.path.exists(path) else f"there is no file {str(path)!r}"
        raise WorkloadError(f"{there}{_nearest_file(path)}")
    path = path.resolve()
    name = f"shardwise_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise WorkloadError(f"{str(path)!r} is not a Python file: its name must end in .py")
    _add_to_path(str(path.parent))
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module there
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, RequestError):
            raise
        raise WorkloadError(f"{path.name} cannot be imported: {_one_line(error)}{_place(error, path)}") from error
    _travel_by_value(module)
    return module


def _travel_by_value(module: ModuleType) -> None:
    """Pickle objects of this module by value, because worker processes cannot import it by its made-up name."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)


def _nearest_file(path: Path) -> str:
    neighbours = (
        [str(path.with_name(other.name)) for other in path.parent.glob("*.py")] if os.path.isdir(path.parent) else []
    )
    return nearest(str(path), neighbours)


def _place(error: BaseException, within: Path | None = None) -> str:
    """Format where an error was raised, as ' (file.py, line 3)'; frames of the file `within` take precedence."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if within is not None and Path(frame.filename) == within]
    outside = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    frame = next(iter(inside[-1:] or outside[-1:]), None)
    return f" ({frame.filename}, line {frame.lineno})" if frame else ""


def _one_line(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(str(message).split())
    if isinstance(error, SystemExit):
        return f"SystemExit: {text}: a workload must not end the program"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
