"""Settings of a workload function: `--set key=value` is converted by the parameter's annotation or default."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from shardwise.errors import WorkloadError, nearest
from shardwise.units import parse_number, parse_whole

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NONE = ("none", "null")
_WORDS = {int: "a whole number (int)", float: "a number (float)", bool: "true or false (bool)"}
_READERS: dict[Any, Callable[[str], Any]] = {int: parse_whole, float: parse_number, str: str, Path: Path}
_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be set by name, with annotations resolved to types where possible."""
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    return {
        name: parameter.replace(annotation=_resolved(parameter.annotation, scope))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in _KINDS
    }


def _resolved(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """Resolve an annotation that is text, as `from __future__ import annotations` makes it, to the type it names.

    Returns `Parameter.empty` if it cannot be resolved.
    """
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {**vars(typing), "Path": Path, **scope})  # code of the workload's own file
    except Exception:  # a name that only type checkers see: the default decides the type
        return inspect.Parameter.empty


def convert_settings(
    where: str, parameters: Mapping[str, inspect.Parameter], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert settings to keyword arguments; values that are not text are used unchanged.

    Args:
        where: the workload as the user wrote it, for messages.
        parameters: parameters of the workload function, see `parameters_of`.
        settings: map from a parameter's name to text or a value.

    Raises:
        WorkloadError: a name is unknown, a value cannot be converted, or a required parameter has no value.
    """
    for name in settings:
        if name not in parameters:
            known = f"known are {', '.join(parameters)}" if parameters else "it has none"
            raise WorkloadError(f"{where} has no parameter {name!r}: {known}{nearest(name, parameters)}")
    required = (name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)
    missing = [name for name in required if name not in settings]
    if missing:
        names = ", ".join(repr(name) for name in missing)
        them = "them" if len(missing) > 1 else "it"
        raise WorkloadError(f"{where} needs a value for {names}: give {them} with --set {missing[0]}=VALUE")
    return {
        name: convert(value, parameters[name]) if isinstance(value, str) else value for name, value in settings.items()
    }


def convert(text: str, parameter: inspect.Parameter) -> Any:
    """Convert `text` to the type of `parameter`. Raises WorkloadError naming the value and the type."""
    kind = parameter.annotation
    if kind is inspect.Parameter.empty or kind is Any:
        kind = str if parameter.default in (inspect.Parameter.empty, None) else type(parameter.default)
    try:
        return _convert(text, kind)
    except ValueError:
        raise WorkloadError(f"{parameter.name}={text}: must be {_described(kind)}{_guess(text, kind)}") from None
    except TypeError:
        raise WorkloadError(
            f"{parameter.name}={text}: a parameter of type {_described(kind)} cannot be set from text"
        ) from None


def _convert(text: str, kind: Any) -> Any:
    """Convert text to a type. Raises ValueError if the text does not fit, TypeError if no text can give the type."""
    if kind is bool:
        return _boolean(text)
    if kind is types.NoneType:
        return _member(text.lower(), dict.fromkeys(_NONE))
    if kind in _READERS:
        return _READERS[kind](text)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _member(text, {str(choice): choice for choice in typing.get_args(kind)})
    if origin in (Union, types.UnionType):
        return _first(text, typing.get_args(kind))
    raise TypeError(f"cannot convert text to {kind}")


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _member(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _first(text: str, kinds: tuple[Any, ...]) -> Any:
    """Convert text to the first type of a union that it fits.

    None is tried first, and text and paths last, because they fit everything.
    """
    fits = False
    for kind in sorted(kinds, key=lambda kind: (kind is not types.NoneType, kind in (str, Path))):
        try:
            return _convert(text, kind)
        except ValueError:
            fits = fits or kind is not types.NoneType
        except TypeError:
            continue
    # ValueError if another text could have been converted, else TypeError
    raise ValueError(text) if fits else TypeError(f"cannot convert text to {kinds}")


def _described(kind: Any) -> str:
    if kind is types.NoneType:
        return "none"
    if typing.get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_described(member) for member in typing.get_args(kind))
    return _WORDS.get(kind) or str(getattr(kind, "__name__", kind))


def _guess(text: str, kind: Any) -> str:
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return nearest(text, [str(choice) for choice in choices])
