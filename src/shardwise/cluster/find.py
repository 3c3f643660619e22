"""The cluster that a text means: a file, or devices of the catalogue."""

from __future__ import annotations

import os

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.reading import read_cluster


def find_cluster(text: str) -> Cluster:
    """The cluster of a file (it ends in `.toml`, or is there), else of a catalogue specification such as `h100x1024`.

    Raises:
        ClusterError: the file is wrong, or the catalogue has no such name.
    """
    if text.endswith(".toml") or os.path.isfile(text):
        return read_cluster(text)
    return catalogue.cluster(text)
