"""Reports of `simulate` and `plan`: play the steps of the best strategies, and predict what if."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.commands.forecast import cluster_document, step_parts
from shardwise.commands.report import predicted_document, write_report
from shardwise.commands.report_files import left_out_note
from shardwise.commands.what_if import WhatIf, source_words
from shardwise.predict.profile.source import ProfileSource
from shardwise.run.training.log import finite
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

MOST_PLAYED = 4
"""Largest number of strategies of a report whose step is played, operation by operation."""

WHAT_IF_SECONDS = 20.0
"""Processor time for the settings of the what-if panel."""


def write_predicted(
    path: Path,
    kind: str,
    document: Mapping[str, Any],
    profiles: ProfileSource,
    cluster: Cluster,
    source: Source,
    name: str,
) -> None:
    """Write the report of `simulate` or `plan`.

    Args:
        path: file to write.
        kind: the command.
        document: its JSON document.
        profiles: profiles of the workload.
        cluster: the cluster.
        source: source of the workload.
        name: the cluster on the command line; empty for this machine.

    Raises:
        RunFolderError: the file cannot be written.
    """
    words: list[str] = []
    candidates = sorted(document["candidates"], key=lambda each: float(each["step_seconds"]))
    details = {
        each["strategy"]: step_details(profiles, Strategy.parse(each["strategy"]), cluster)
        for each in candidates[:MOST_PLAYED]
    }
    given = [Strategy.parse(each["strategy"]) for each in candidates[:MOST_PLAYED]]
    what_if = {} if not given else what_if_document(profiles, cluster, name, given, source, WHAT_IF_SECONDS)
    if isinstance(source.workload, str):
        words = [*source_words(kind, source), *(["--cluster", name] if name else [])]
        for each in document["candidates"] if kind == "simulate" else ():
            words += ["--strategy", each["strategy"]]
    write_report(path, predicted_document(kind, finite(dict(document)), finite(details), finite(what_if), words))


def what_if_document(
    profiles: ProfileSource,
    cluster: Cluster,
    name: str,
    given: Sequence[Strategy],
    source: Source | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the document of `what_if` around given strategies, the first of which says where it begins."""
    return WhatIf(profiles, cluster, name, given, given[0].workers, seconds).document(source)


def step_details(profiles: ProfileSource, strategy: Strategy, cluster: Cluster) -> dict[str, Any]:
    """Return what a report shows of a strategy beside its candidate: cluster, played step or why not, model as cut."""
    if profiles.software is not None:
        reason = "only the step of Shardwise's own program is played"
        return {"cluster": cluster_document(cluster, strategy.workers), "timeline_reason": reason}
    parts = step_parts(profiles.of, strategy, cluster)
    return {**parts, **left_out_note(parts), "model": {"segments": parts["segments"]}}
