"""Sizes of a row's model, from its columns and, for models known by name, from `architectures.csv`.

No column says whether the MLP has a gate, or whether embedding and output share their matrix. If the name does not
decide it, the combination is chosen whose number of parameters is nearest to the stated one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from shardwise.predict.published.columns import MissingColumn, Row, number, text, whole
from shardwise.predict.runtime.sizes import Sizes

GATED = ("llama", "mistral", "qwen", "gemma", "palm", "internlm", "baichuan", "deepseek", "yi-")
"""Families whose MLP has a gate, by substrings of their models' names."""

LEARNED = ("gpt", "mpt", "opt", "bert")
"""Families with learned positions and biases, by substrings of their models' names."""

SHAPE = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")

NEAR = 0.002
"""Relative difference below which two distances to the stated number of parameters count as equal."""

EXPERTS = 2.0
"""Ratio of stated to computed parameters above which a model is a mixture of experts, whose number no column says."""


@cache
def architectures() -> Mapping[str, Mapping[str, str]]:
    """Return the rows of `architectures.csv`, by the model's name reduced to lower-case letters and digits."""
    lines = resources.files("shardwise.predict.published").joinpath("architectures.csv").read_text(encoding="utf-8")
    return {_plain(row["model"]): row for row in csv.DictReader(lines.splitlines())}


def sizes_of(row: Row) -> tuple[Sizes, list[str]]:
    """Return the sizes of a row's model, and a list of those that were taken from the model's name.

    Raises:
        MissingColumn: neither the row nor the model's name gives a size, or the model is a mixture of experts.
    """
    known = architectures().get(_plain(text(row, "model")), {})
    stated = {name: whole(row, name) for name in SHAPE}
    if any(stated[name] not in (None, int(known[name])) for name in ("layers", "hidden") if known):
        known = {}
    assumed = []
    for name in SHAPE:
        if stated[name] is None and known:
            stated[name] = int(known[name])
            assumed.append(f"{name} of {known['model']}")
    if stated["kv_heads"] is None:
        stated["kv_heads"] = stated["heads"]
    missing = [name for name in SHAPE if stated[name] is None]
    if missing:
        raise MissingColumn(f"no {', '.join(missing)}")
    sequence = whole(row, "seq_len")
    if sequence is None:
        raise MissingColumn("no seq_len")
    model = text(row, "model").lower()
    learned = any(word in model for word in LEARNED)
    plain: dict[str, Any] = {**stated, "sequence": sequence, "learned_positions": learned, "biases": learned}
    if plain["hidden"] % plain["heads"]:
        raise MissingColumn(f"heads is {plain['heads']}, which does not divide hidden {plain['hidden']}")
    return _nearest(row, plain, known), assumed


def _nearest(row: Row, plain: Mapping[str, Any], known: Mapping[str, str]) -> Sizes:
    """Return the sizes whose number of parameters is nearest to the stated one; the usual sizes if none is stated."""
    gated = {"3" in known["mlp"]} if known else {False, True}
    tied = {known["embeddings"] == "tied"} if known else _tied(text(row, "notes").lower())
    candidates = [Sizes(**plain, gated=g, tied=t) for g in sorted(gated) for t in sorted(tied, reverse=True)]
    usual = sorted(candidates, key=lambda sizes: sizes.gated != _usually_gated(text(row, "model").lower(), plain))
    parameters = number(row, "params_b")
    if parameters is None:
        return usual[0]
    distance = {sizes: abs(sizes.parameters / (parameters * 1e9) - 1) for sizes in candidates}
    nearest = min(distance.values())
    if parameters * 1e9 > EXPERTS * max(sizes.parameters for sizes in candidates):
        raise MissingColumn(f"params_b is {parameters:g}, above what the sizes make: a mixture of experts?")
    return next(sizes for sizes in usual if distance[sizes] <= nearest + NEAR)


def _tied(notes: str) -> set[bool]:
    """Return the possible values of `Sizes.tied` (embedding and output share their matrix), as far as the notes say."""
    if "untied" in notes and "tied" not in notes.replace("untied", ""):
        return {False}
    return {True, False}


def _usually_gated(model: str, plain: Mapping[str, Any]) -> bool:
    if any(family in model for family in GATED):
        return True
    return not any(family in model for family in LEARNED) and plain["ffn"] != 4 * plain["hidden"]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
