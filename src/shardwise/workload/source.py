"""Source of a workload: a name with settings, or the workload itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.workload.load import load_workload
from shardwise.workload.reading.draws import drawing_from
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
        """Load the workload; what its code draws meanwhile is the same on every worker and each time.

        Raises WorkloadError or DataError.
        """
        workload = self.workload
        if isinstance(workload, str):
            with drawing_from(self.seed or 0):
                workload = load_workload(workload, self.settings)
        return workload if self.seed is None else replace(workload, seed=self.seed)
