"""Find the cluster that a text names: a file, or devices of the catalogue."""

from __future__ import annotations

import os

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.toml_reader import read_cluster


def find_cluster(text: str) -> Cluster:
    """Read a cluster file (an existing file, or a name in `.toml`), or build a catalogue cluster such as `h100x1024`.

    Raises:
        ClusterError: the file is wrong, or the catalogue has no such name.
    """
    if text.endswith(".toml") or os.path.isfile(text):
        return read_cluster(text)
    return catalogue.cluster(text)
