"""Optional packages of recipes, and the extras that install them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from shardwise.errors import WorkloadError


def require(module: str, package: str, extra: str) -> ModuleType:
    """Import a module of an optional package. Raises WorkloadError with the `extra` that installs it."""
    folder_of(module.partition(".")[0], package, extra)
    return importlib.import_module(module)


def folder_of(module: str, package: str, extra: str) -> Path:
    """Return the folder of an optional package without importing it, which can take seconds. Raises like `require`."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise WorkloadError(f"{package} is not installed and this workload needs it: pip install 'shardwise[{extra}]'")
    return Path(next(iter(found.submodule_search_locations)))
