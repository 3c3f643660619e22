"""The plan file: TOML that a user can read and edit, and `train --strategy plan.toml` runs.

version = 1
workload = "language"
cluster = "h100x8"
strategy = "fsdp=8,zero=2,microbatches=1"

cuts = [[0], [12]]                  # with pp or blocks: segments at which the blocks of each stage begin

[prediction]                        # predicted cost at the time the plan was made
step_seconds = 0.29
...
[made_with]
shardwise = "0.1.0"
torch = "2.13.0"
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise.errors import RequestError, RunFolderError, StrategyError, nearest, one_line
from shardwise.options import MOST
from shardwise.strategy import Strategy
from shardwise.tomlfile import read_toml

if TYPE_CHECKING:
    from shardwise.splitting.balance import Cuts

VERSION = 1

LARGEST = 1 << 20
"""Largest size of a plan file in bytes."""

_KEYS = ("version", "workload", "settings", "cluster", "strategy", "cuts", "prediction", "made_with")
_PREDICTED = ("step_seconds", "memory_bytes", "samples_per_second", "alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """Content of a plan file.

    Attributes:
        workload: name of the workload, as `train` takes it.
        settings: parameters of the workload's function.
        cluster: cluster that was planned for, as `--cluster` takes it; empty means the machine that made the plan.
        strategy: strategy to run.
        cuts: cuts of the step into stages and blocks, see `splitting.balance.Cuts`; if empty, costs decide at run time.
        prediction: predicted costs; keys of `_PREDICTED`.
        made_with: map from a program's name to its version.
    """

    workload: str
    strategy: Strategy
    settings: Mapping[str, str] = field(default_factory=dict)
    cluster: str = ""
    cuts: Cuts = ()
    prediction: Mapping[str, float] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)


def is_plan_file(text: str) -> bool:
    """Return whether a strategy is given as the name of a plan file."""
    return text.endswith(".toml")


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write a plan file atomically, through a temporary file beside it that is then renamed.

    Raises:
        RunFolderError: the folder does not exist, the path is a folder, or the file cannot be written.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise RunFolderError(f"out={path}: {what}, give the name of a file")
    lines = [
        f"version = {VERSION}",
        f"workload = {_quoted(plan.workload)}",
        f"cluster = {_quoted(plan.cluster)}",
        f"strategy = {_quoted(str(plan.strategy) or 'single')}",
    ]
    if plan.cuts:
        lines.append(f"cuts = {json.dumps(plan.cuts)}")
    for name in ("settings", "prediction", "made_with"):
        table: Mapping[str, Any] = getattr(plan, name)
        if table:
            lines += ["", f"[{name}]", *(f"{_key(key)} = {_value(value)}" for key, value in table.items())]
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(path)
    except (OSError, UnicodeEncodeError) as error:  # UTF-8 cannot encode a name with lone surrogates
        raise RunFolderError(f"out={path}: cannot be written: {error}") from None


def read_plan(path: Path) -> PlanFile:
    """Read a plan file.

    Raises:
        RequestError: the file cannot be read, or a key is missing, unknown or wrong; the message names file and key.
        StrategyError: the file's strategy is wrong.
    """
    found = read_toml(path, LARGEST, RequestError, "plan file")
    for key in found:
        if key not in _KEYS:
            raise RequestError(f"plan file {path}: unknown key {key}{nearest(key, _KEYS)}")
    if found.get("version") != VERSION or isinstance(found["version"], bool):
        raise RequestError(f"plan file {path}: version={found.get('version')}: this program reads version {VERSION}")
    tables = {name: _table(path, found, name) for name in ("settings", "prediction", "made_with")}
    try:
        strategy = Strategy.parse(_text(path, found, "strategy"))
    except StrategyError as error:
        raise StrategyError(f"plan file {path}: {error}") from None
    return PlanFile(
        workload=_text(path, found, "workload"),
        strategy=strategy,
        settings={key: _setting(path, key, value) for key, value in tables["settings"].items()},
        cluster=_text(path, found, "cluster") if "cluster" in found else "",
        cuts=_cuts(path, found.get("cuts", [])),
        prediction={key: _number(path, key, value) for key, value in tables["prediction"].items()},
        made_with={one_line(key): one_line(_text(path, tables["made_with"], key)) for key in tables["made_with"]},
    )


def _text(path: Path, found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    if not isinstance(value, str):
        raise RequestError(f"plan file {path}: {key}={value!r}: must be text in quotes")
    return value


def _setting(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise RequestError(
            f"plan file {path}: settings.{key}={value!r}: must be text in quotes, a number, true or false"
        )
    return str(value)


def _table(path: Path, found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = found.get(key, {})
    if not isinstance(value, dict):
        raise RequestError(f"plan file {path}: {key}={value!r}: must be a table, [{key}]")
    return value


def _cuts(path: Path, value: Any) -> Cuts:
    stages = value if isinstance(value, list) and all(isinstance(stage, list) and stage for stage in value) else [[-1]]
    starts: list[Any] = [start for stage in stages for start in stage]
    whole = all(isinstance(start, int) and not isinstance(start, bool) and start <= MOST for start in starts)
    if not whole or any(a >= b for a, b in pairwise(starts)) or (starts and starts[0] != 0):
        raise RequestError(
            f"plan file {path}: cuts={value!r}: must be a list of stages, each a list of segments at which its blocks "
            "begin, ascending from 0: [[0], [12]]"
        )
    return tuple(tuple(stage) for stage in stages)


def _number(path: Path, key: str, value: Any) -> float:
    if key not in _PREDICTED:
        raise RequestError(f"plan file {path}: unknown key prediction.{key}{nearest(key, _PREDICTED)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RequestError(f"plan file {path}: prediction.{key}={value!r}: must be a number, 0 or more")
    return float(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML must escape DEL, JSON need not


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _quoted(name)


def _value(value: Any) -> str:
    return repr(value) if isinstance(value, int | float) else _quoted(str(value))
