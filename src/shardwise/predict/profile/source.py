"""Interface of sources of profiles: of the traced module, or of a transformer as other software trains it."""

from __future__ import annotations

from typing import Protocol

from shardwise.predict.profile.profile import Profile
from shardwise.predict.runtime.software import Software
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


class Degrees(Protocol):
    """Degrees of tensor parallelism that a model allows."""

    def refusal(self, degree: int) -> str | None:
        """Return the reason against a degree. Returns None if it is possible."""


class ProfileSource(Protocol):
    """Source of a workload's profiles."""

    @property
    def workload(self) -> Workload:
        """Return the workload."""

    @property
    def software(self) -> Software | None:
        """Return the software that runs the workload. Returns None for Shardwise's own."""

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return the profile that a strategy is predicted from.

        Args:
            strategy: the strategy.
            batch_size: global batch size; 0 selects the workload's.

        Raises:
            StrategyError: the batch does not divide into the strategy's microbatches.
            WorkloadError: the strategy has tp above 1, but the step cannot be traced.
        """

    def tensor_degrees(self) -> Degrees:
        """Return the degrees of tensor parallelism that the model allows.

        Raises:
            Untraceable: the step cannot be traced.
        """
