"""Lookup of the catalogue's device that a row's text means: by its name, else by words in common with a device's names.

"A100-80GB (8-GPU node; card memory not printed)"   a100-sxm-80
"H100-96GB-HBM2e-500W"                              h100-96-hbm2e
"""

from __future__ import annotations

import re

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Device
from shardwise.errors import ClusterError
from shardwise.predict.published.columns import MissingColumn

MAKERS = {"nvidia", "amd", "intel", "tesla", "instinct", "geforce", "gpu", "gpus"}
"""Words that do not distinguish one device from another."""


def find(text: str) -> Device:
    """Return the catalogue's device that a text means.

    Raises:
        MissingColumn: the catalogue has no such device; the message suggests the nearest known name.
    """
    if not text.strip():
        raise MissingColumn("no gpu")
    error = ""
    for candidate in _candidates(text):
        try:
            return _device(candidate)
        except ClusterError as wrong:
            error = error or str(wrong)
    raise MissingColumn(f"unknown gpu: {error}")


def _device(name: str) -> Device:
    """Return the device of a name, else that of the node of that name. Raises ClusterError if there is neither."""
    try:
        return catalogue.device(name)
    except ClusterError as wrong:
        try:
            return catalogue.device(catalogue.node(name).device)
        except ClusterError:
            raise wrong from None


def _candidates(text: str) -> list[str]:
    """Return names to try in order, from the whole text down to its first word.

    Shorter ones leave out remarks in parentheses, makers, and words after the model's name.
    """
    bare = re.sub(r"\(.*?\)", " ", text).strip()
    words = [word for word in re.split(r"[\s_-]+", bare.lower()) if word and word not in MAKERS]
    words = [re.sub(r"^(\d+)x(?=[a-z])", "", word) for word in words]
    words = [re.sub(r"^(\d+)(g|gib)$", r"\1gb", word) for word in words]
    joined = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    memory = [f"{words[0]} {word}" for word in words[1:] if re.fullmatch(r"\d+gb", word)] if words else []
    return [text, bare, *joined[:1], *memory, *joined[1:]]


def sold_in(device: Device) -> str:
    """Return the catalogue's name of the node that a device is sold in."""
    return catalogue.sold_in(device.name)
