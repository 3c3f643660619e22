"""Model as a strategy has cut it: the stages, what is sharded along which axis, what stays whole, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from torch import nn

from shardwise.parallel.program import Program
from shardwise.parallel.state.layout import TensorPlacement
from shardwise.run.control_group import Workers
from shardwise.strategy import Strategy


def cut_model(program: Program, workers: Workers) -> dict[str, Any]:
    """Describe how the model of a program is cut; collective.

    Returns:
        `cuts`, the first segments of the blocks of each stage (None without a pipeline or blocks); `shards`, `whole`
        and `sharded_parameter_share`. Of workers that hold the same stages the first one's parts are listed.
    """
    mesh = program.mesh
    speaks = all(mesh.coordinate(axis) == 0 for axis in program.strategy.axes if axis != "pp")
    mine = _own_parts(program) if speaks else {}
    parts: dict[str, dict[str, Any]] = {}
    for text in workers.exchange(json.dumps(mine)):
        for name, part in json.loads(text).items():
            parts.setdefault(name, part)
    division = getattr(program.engine, "division", None)
    ordered = {name: parts[name] for name in program.engine.trained if name in parts} | parts
    return {"cuts": division and [list(stage) for stage in division.cuts], **_sorted_out(ordered)}


def _own_parts(program: Program) -> dict[str, dict[str, Any]]:
    """Return shape, axes and reason of each parameter that this worker holds, by name."""
    strategy = program.strategy
    uncut = {name: each.reason for each in getattr(program.engine, "uncut", ()) for name in each.names}
    return {
        name: _part(held, strategy, uncut.get(name, ""))
        for name, held in program.engine.held.items()
        if isinstance(held.tensor, nn.Parameter)
    }


def _part(held: TensorPlacement, strategy: Strategy, uncut: str) -> dict[str, Any]:
    shape, here = held.layout.shape, held.layout.local_shape
    axes: dict[str, int] = {}
    if held.sharded:
        axes["tp"] = next((dim for dim in range(1, len(shape)) if here[dim] < shape[dim]), 0)
    rows = shape[0] // (strategy.tp if axes.get("tp") == 0 else 1) if shape else 0
    if strategy.splits_parameters and shape and (here[0] < rows or held.holders < _holders(strategy, held)):
        axes["fsdp"] = 0
    return {"shape": list(shape), "axes": axes, "reason": _reason(strategy, uncut)}


def _holders(strategy: Strategy, held: TensorPlacement) -> int:
    """Return how many workers would hold each element of a tensor if `fsdp` did not split it."""
    return strategy.workers // strategy.pp // (strategy.tp if held.sharded else 1)


def _reason(strategy: Strategy, uncut: str) -> str:
    """Say why a parameter is whole on each worker of its stage."""
    if strategy.workers == 1:
        return "there is one worker"
    if uncut:
        return uncut
    if strategy.splits_parameters:
        return "fsdp cannot split a single number, nor what stays in float32 beside others in bfloat16"
    if strategy.tp > 1:
        return "no operation allows a tensor-parallel cut"
    return "a stage holds its parameters whole" if strategy.pp > 1 else "dp replicates the model"


def _sorted_out(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    shards, whole = [], []
    for name, part in parts.items():
        if part["axes"]:
            spec = ", ".join(f"Shard({dim}) over {axis}" for axis, dim in part["axes"].items())
            axis = "+".join(part["axes"])
            shards.append({"parameter": name, "shape": part["shape"], "axis": axis, "spec": spec})
        else:
            whole.append({"parameter": name, "shape": part["shape"], "reason": part["reason"]})
    elements = _elements(shards)
    total = elements + _elements(whole)
    return {"shards": shards, "whole": whole, "sharded_parameter_share": elements / total if total else 0.0}


def _elements(parts: Iterable[Mapping[str, Any]]) -> int:
    return sum(prod(part["shape"]) for part in parts)
