"""Kubernetes: `--engine kubernetes --dry-run` prints the manifest of a job for Kubeflow's training operator.

The operator starts one pod a worker and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each. A pod that is told
to end (SIGTERM, exit status 143) is started again and goes on from the newest checkpoint; one that fails for another
reason (exit status below 128) is not.

Source: https://www.kubeflow.org/docs/components/trainer/legacy-v1/user-guides/pytorch/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shardwise.errors import RequestError
from shardwise.launch.launcher import Allocation, LaunchRequest, RunningJob, has_option, no_hosts

SPARE_SECONDS = 10
"""Seconds beyond the grace of a run that a pod gets to end."""


class KubernetesLauncher:
    """Writer of manifests; it starts nothing itself."""

    name = "kubernetes"

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return None: there is no allocation."""
        return None

    def check(self, asked: LaunchRequest) -> None:
        """Raise RequestError: kubectl starts the job."""
        raise RequestError(
            "engine kubernetes starts nothing itself: give --dry-run, and what it prints to kubectl apply --filename -"
        )

    def start(self, asked: LaunchRequest) -> RunningJob:
        """Raise RequestError: kubectl starts the job."""
        raise AssertionError("`check` refuses the job")

    def script(self, asked: LaunchRequest) -> str:
        """Return the manifest, as JSON, which kubectl reads as it reads YAML. Raises RequestError."""
        if asked.hosts:
            raise no_hosts(self.name, "the cluster places the pods")
        if not asked.image:
            raise RequestError("engine kubernetes: --image is missing: name the container image of the workers")
        if not has_option(asked.arguments, "--out"):
            raise RequestError("engine kubernetes: --out is missing: name a folder that all pods share")
        return json.dumps(manifest(asked), indent=2) + "\n"


def manifest(asked: LaunchRequest) -> dict[str, Any]:
    """Return the PyTorchJob of a job."""
    resume = [] if has_option(asked.arguments, "--resume") else ["--resume", "auto"]
    pod = {
        "terminationGracePeriodSeconds": round(asked.grace) + SPARE_SECONDS,
        "containers": [
            {
                "name": "pytorch",  # the operator sets the ranks of the container with this name
                "image": asked.image,
                "command": ["python", "-m", "shardwise", *asked.arguments, *resume],
            }
        ],
    }
    replicas = {"Master": 1, "Worker": asked.workers - 1}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "shardwise"},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "All"},
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "ExitCode", "template": {"spec": pod}}
                for role, count in replicas.items()
                if count
            },
        },
    }
