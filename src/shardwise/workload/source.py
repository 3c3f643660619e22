"""Source of a workload: a name with settings, or the workload itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Source of a workload: its name or the workload itself. Workers load a named one themselves, so no data is sent.

    Attributes:
        workload: name of the workload (see `workload.load`), or the workload.
        settings: parameter -> value for the function of that name.
        seed: seed that overrides the workload's own; None: keep it.
    """

    workload: str | Workload
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def load(self) -> Workload:
        """Load the workload. Raises WorkloadError or DataError."""
        named = self.workload
        workload = load_workload(named, self.settings) if isinstance(named, str) else named
        return workload if self.seed is None else replace(workload, seed=self.seed)
