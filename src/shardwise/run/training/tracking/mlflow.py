"""Runs of MLflow: in the tracking store that MLFLOW_TRACKING_URI names, else in files in the run's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from shardwise.run.training.tracking.tracker import TrackedRun

NAME = "mlflow"
EXPERIMENT = "shardwise"
"""Name of the experiment if MLFLOW_EXPERIMENT_NAME is not set."""

SEND_SECONDS = 2.0
"""Longest time that values wait for further ones before they are sent together."""

MOST_SENT = 900
"""Number of values that are sent together; MLflow takes at most 1,000."""

LONGEST_VALUE = 6000
"""Largest number of characters of a parameter's value in MLflow."""


class MlflowRun:
    """Run of MLflow; a resumed run continues the one before if the store still has it.

    Args:
        run: the run to track.

    Raises:
        Exception: MLflow cannot open it; so may all methods.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it tells its makers that it is used
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it wants a database
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / NAME).resolve().as_uri()
        self._client = MlflowClient(tracking_uri=store)
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        self._id = self._continued(run.identity(NAME)) or self._begun(run)
        run.keep_identity(NAME, self._id)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if len(self._waiting) > MOST_SENT or time.monotonic() > self._sent + SEND_SECONDS:
            self._send()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of an evaluation."""
        self.step(step, values)

    def close(self, *, failed: bool) -> None:
        """Send all waiting values, and end the run as finished or failed."""
        self._send()
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _continued(self, identity: str | None) -> str | None:
        """Reopen the run with an id. Returns None if there is no id, or no such run in this store."""
        from mlflow.exceptions import MlflowException

        if identity is None:
            return None
        try:
            self._client.update_run(identity, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return identity

    def _begun(self, run: TrackedRun) -> str:
        """Begin a run with the facts in `run.config` as parameters, and return its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        identity: str = self._client.create_run(experiment, run_name=run.folder.resolve().name).info.run_id
        for key, value in run.config.items():
            self._client.log_param(identity, key, str(value)[:LONGEST_VALUE])
        return identity

    def _send(self) -> None:
        self._sent = time.monotonic()
        while self._waiting:
            part, self._waiting = self._waiting[:MOST_SENT], self._waiting[MOST_SENT:]
            self._client.log_batch(self._id, metrics=part)
