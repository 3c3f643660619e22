"""Python values that a step reads and may change: attributes of modules, and what functions refer to.

A trace writes such a value into the graph as a constant. So a trace must notice that a forward pass changes one
(`self.calls += 1`), and an engine that runs graphs must notice that it changed between two steps.

    module attributes, class attributes    x.calls, Net.calls, also inside lists, dicts and plain objects
    variables of closures, defaults        of `forward` and of the workload's functions
    globals                                those that these functions name
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)
"""Types whose values are compared by value."""

_OWN = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes of every module that torch keeps itself."""

_CONTAINERS = (list, dict, OrderedDict, defaultdict, set, deque)
"""Containers whose items are looked at. A class of one's own may give other items than it holds."""

_LARGE = 4096
"""Length from which on the items of a container are not looked at."""

_DEPTH = 6
"""Number of containers inside each other that are looked at."""

_FOREIGN = (
    *("torch", "numpy", "builtins", "typing", "collections", "functools", "logging", "shardwise", "transformers"),
    *("keras", "lightning", "pytorch_lightning"),
)


@dataclass(slots=True, eq=False)
class Place:
    """Container of values: the attributes of an object, a list, a dict, the variable of a closure, some globals.

    Attributes:
        label: how it is named to the user.
        read: returns its items by key, as a new dict.
        write: gives it these items again.
        items: the items when the place was found.
        holders: names of the modules that hold it; None stands for functions, classes and globals.
        parent: the place that holds it, if it was found inside another.
        held: the live mapping behind it, if it is one.
    """

    label: str
    read: Callable[[], dict[Any, Any]]
    write: Callable[[Mapping[Any, Any]], None]
    items: dict[Any, Any] = field(default_factory=dict)
    holders: set[str | None] = field(default_factory=set)
    parent: Place | None = None
    held: Mapping[Any, Any] | None = None

    def all_holders(self) -> set[str | None]:
        """Return the names of the modules that hold it or a place that it is in."""
        return self.holders | (set() if self.parent is None else self.parent.all_holders())

    def named(self, key: Any) -> str:
        """Name one of the items to the user."""
        return f"{self.label}[{key!r}]" if not isinstance(key, str) else f"{self.label}.{key}".strip(".")


@dataclass(frozen=True, slots=True)
class Change:
    """Item of a place that has another value than before.

    Attributes:
        place: the place.
        key: its key there.
        plain: whether it is no tensor: a number, a string, a container, ...
    """

    place: Place
    key: Any
    plain: bool

    def __str__(self) -> str:
        """Name it to the user."""
        return self.place.named(self.key)


class PythonState:
    """Values in Python of a model's modules and of functions, as they were when this object was made.

    Args:
        model: its modules are looked at.
        functions: what they refer to is looked at, too.
        without: names of modules that are left out, with all modules in them.
    """

    def __init__(
        self, model: nn.Module, functions: Iterable[Callable[..., Any]] = (), *, without: Iterable[str] = ()
    ) -> None:
        self.places: list[Place] = []
        self._found: dict[int, Place] = {}
        self._alive: list[Any] = []
        left_out = tuple(without)
        for name, module in model.named_modules():
            if not any(name == path or name.startswith(f"{path}.") for path in left_out):
                self._look_at_module(name, module)
        for function in functions:
            self._look_at(function, "", None, None)
        for place in self.places:
            place.items = place.read()

    def changes(self) -> list[Change]:
        """Return what has changed since."""
        return [change for place in self.places for change in _differences(place, place.items, place.read())]

    def differences(self, before: PythonState) -> list[Change]:
        """Return what is different in the state `before` this one. Places that only one of them has do not count."""
        old = {id(value): place for value, place in zip(before._alive, before.places, strict=True)}
        found: list[Change] = []
        for value, place in zip(self._alive, self.places, strict=True):
            if id(value) in old:
                found += _differences(place, old[id(value)].items, place.items)
        return found

    def moved(self) -> bool:
        """Return whether a plain value has changed since. New items do not count."""
        for place in self.places:
            now = place.read() if place.held is None else place.held
            for key, value in place.items.items():
                if now.get(key, _Missing) is not value and isinstance(value, PLAIN) and not same(value, now.get(key)):
                    return True
        return False

    def read(self) -> list[dict[Any, Any]]:
        """Return the values that the places have now, for `write`."""
        return [place.read() for place in self.places]

    def write(self, values: Sequence[Mapping[Any, Any]]) -> None:
        """Give the places again the values that they had at a call of `read`."""
        for place, items in zip(self.places, values, strict=True):
            now = place.read()
            if len(now) != len(items) or any(now.get(key, _Missing) is not value for key, value in items.items()):
                place.write(items)

    def restore(self) -> None:
        """Give everything that has changed its old value again."""
        self.write([place.items for place in self.places])

    @contextmanager
    def as_at(self, values: Sequence[Mapping[Any, Any]]) -> Iterator[None]:
        """Run the block with the values of an earlier `read`. Afterwards all values are as before."""
        now = self.read()
        self.write(values)
        try:
            yield
        finally:
            self.write(now)

    def _look_at_module(self, name: str, module: nn.Module) -> None:
        label = name or type(module).__name__
        place = self._add(module, _attributes(label, module), name, None)
        for key, value in list(vars(module).items()):
            if key not in _OWN:
                self._look_at(value, f"{label}.{key}", name, place)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for hook in getattr(module, kind).values():
                self._look_at(hook, label, name, place)
        for cls in type(module).__mro__:
            if not _foreign(cls) and id(cls) not in self._found:
                self._add(cls, _class_attributes(cls), None, None)
                for value in vars(cls).values():
                    self._look_at(value, cls.__name__, None, None)

    def _look_at(self, value: Any, label: str, holder: str | None, parent: Place | None, depth: int = 0) -> None:
        if isinstance(value, (*PLAIN, Tensor, types.ModuleType, type)) or depth > _DEPTH:
            return
        if id(value) in self._found:
            self._found[id(value)].holders.add(holder)
            return
        place, inside = parent, list[tuple[str, Any]]()
        if type(value) in _CONTAINERS:
            if len(value) > _LARGE:
                return
            place = self._add(value, _container(label, value), holder, parent)
            inside = [(label, each) for each in (value.values() if isinstance(value, dict) else list(value))]
        elif isinstance(value, tuple):
            inside = [(label, each) for each in value]
        elif is_function(value):
            inside = list(self._of_function(unwrapped(value), holder, parent))
        elif isinstance(value, nn.Module) or (hasattr(value, "__dict__") and not _foreign(type(value))):
            place = self._add(value, _attributes(label or type(value).__name__, value), holder, parent)
            inside = [(f"{label}.{key}", each) for key, each in list(vars(value).items()) if key not in _OWN]
        for name, each in inside:
            self._look_at(each, name, holder, place, depth + 1)

    def _of_function(self, function: Any, holder: str | None, parent: Place | None) -> Iterator[tuple[str, Any]]:
        if isinstance(function, types.MethodType):
            yield "", function.__self__
            function = function.__func__
        if isinstance(function, functools.partial):
            yield "", (*function.args, *function.keywords.values(), function.func)
        if not isinstance(function, types.FunctionType) or _foreign(function) or id(function) in self._found:
            return
        names = named_globals(function)
        self._add(function, _globals(function.__globals__, names), holder, parent)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._add(cell, _variable(name, cell), holder, parent)
        yield from captured_by_name(function)

    def _add(self, value: Any, place: Place, holder: str | None, parent: Place | None) -> Place:
        place.holders.add(holder)
        place.parent = parent
        self._found[id(value)] = place
        self._alive.append(value)  # or another object may get its id
        self.places.append(place)
        return place


@contextmanager
def for_trace(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Leave modules in their modes, or put them into evaluation mode unless `training` is set, inside the block.

    Afterwards each has its mode again, without a call of its `train`.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        if not training:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _differences(place: Place, old: Mapping[Any, Any], new: Mapping[Any, Any]) -> Iterator[Change]:
    for key in dict.fromkeys((*old, *new)):
        was, now = old.get(key, _Missing), new.get(key, _Missing)
        if not same(was, now):
            yield Change(place, key, not _differ_in_tensors(was, now))


def _differ_in_tensors(old: Any, new: Any) -> bool:
    """Return whether two values that are not the same differ in nothing but tensors, or references to such."""
    if isinstance(new, (list, tuple)) and isinstance(old, (list, tuple)):
        pairs = zip(old, new, strict=False)
        return len(old) == len(new) and all(same(a, b) or _differ_in_tensors(a, b) for a, b in pairs)
    if isinstance(new, weakref.ref):
        return isinstance(old, weakref.ref)
    return isinstance(new, Tensor) and isinstance(old, (Tensor, type(None), type))


class _Missing:
    """Stands for the value of an attribute that does not exist."""


def same(old: Any, new: Any) -> bool:
    """Return whether two values are the same: the same object, or equal plain values, or containers of such."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, PLAIN):
        return bool(old == new) or (old != old and new != new)
    if isinstance(old, (list, tuple, deque)):
        return len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(same(value, new[key]) for key, value in old.items())
    return isinstance(old, (set, frozenset)) and bool(old == new)


def _foreign(thing: Any) -> bool:
    module = str(getattr(thing, "__module__", None) or "builtins")
    return any(module == name or module.startswith(f"{name}.") for name in _FOREIGN)


# ---- functions ------------------------------------------------------------------------------------------------------


def is_function(value: Any) -> bool:
    """Return whether a value is a function, a method or a partial call of one."""
    kinds = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod, property)
    return isinstance(value, kinds)


def unwrapped(function: Any) -> Any:
    """Return the function inside a static method, a class method or a property."""
    if isinstance(function, property):
        return function.fget
    return function.__func__ if isinstance(function, (staticmethod, classmethod)) else function


def named_globals(function: types.FunctionType) -> list[str]:
    """Return the names of the globals that a function, or one defined in it, refers to."""
    codes, names = [function.__code__], dict[str, None]()
    while codes:
        code = codes.pop()
        names.update(dict.fromkeys(name for name in code.co_names if name in function.__globals__))
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return list(names)


def captured_by_name(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function refers to beside its arguments, with a name for each."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    yield from (("", value) for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
    yield from ((name, function.__globals__[name]) for name in named_globals(function))


def captured(function: Any) -> Iterator[Any]:
    """Yield what a function, a method, a partial call or a callable object refers to beside its arguments."""
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        yield from captured(function.func)
    elif isinstance(function, types.MethodType):
        yield function.__self__
        yield from captured(function.__func__)
    elif isinstance(function, types.FunctionType):
        yield from (value for _, value in captured_by_name(function))
    elif hasattr(function, "__dict__"):
        yield from vars(function).values()


# ---- places ---------------------------------------------------------------------------------------------------------


def _attributes(label: str, value: Any) -> Place:
    held = vars(value)

    def write(items: Mapping[Any, Any]) -> None:
        for key in [key for key in held if key not in _OWN and key not in items]:
            del held[key]
        held.update(items)

    return Place(label, lambda: {k: v for k, v in held.items() if k not in _OWN}, write, held=held)


def _class_attributes(cls: type) -> Place:
    def read() -> dict[Any, Any]:
        return {k: v for k, v in vars(cls).items() if isinstance(v, PLAIN) and not k.startswith("__")}

    def write(items: Mapping[Any, Any]) -> None:
        for key, value in items.items():
            setattr(cls, key, value)

    return Place(cls.__name__, read, write)


def _container(label: str, value: Any) -> Place:
    def read() -> dict[Any, Any]:
        if isinstance(value, dict):
            return dict(value)
        return dict.fromkeys(value) if isinstance(value, set) else dict(enumerate(value))

    def write(items: Mapping[Any, Any]) -> None:
        value.clear()
        if isinstance(value, (dict, set)):
            value.update(items)
        else:
            value.extend(items.values())

    return Place(label, read, write)


def _variable(name: str, cell: Any) -> Place:
    def read() -> dict[Any, Any]:
        try:
            return {name: cell.cell_contents}
        except ValueError:
            return {}

    def write(items: Mapping[Any, Any]) -> None:
        for value in items.values():
            cell.cell_contents = value

    return Place("", read, write)


def _globals(held: dict[str, Any], names: list[str]) -> Place:
    return Place("", lambda: {name: held[name] for name in names if name in held}, held.update, held=held)
