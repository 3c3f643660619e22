"""The manifest for Kubernetes is one that the training operator's schema allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import RequestError
from shardwise.launch.engines.kubernetes import KubernetesLauncher
from shardwise.launch.launcher import LaunchRequest

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads(Path(__file__).with_name("pytorchjob_schema.json").read_text())


def written(workers: int, *arguments: str, **fields: Any) -> dict[str, Any]:
    request = LaunchRequest(arguments=("train", *arguments), workers=workers, **({"image": "registry/image"} | fields))
    document: dict[str, Any] = json.loads(KubernetesLauncher().script(request))
    return document


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_a_manifest_is_of_the_published_schema(workers: int) -> None:
    document = written(workers, "image", "--out", "/shared", grace=20.0)
    jsonschema.validate(document, SCHEMA)
    replicas = document["spec"]["pytorchReplicaSpecs"]
    assert sum(each["replicas"] for each in replicas.values()) == workers
    pod = replicas["Master"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 20
    assert pod["containers"][0]["command"][-2:] == ["--resume", "auto"]


def test_the_schema_refuses_a_field_that_it_does_not_have() -> None:
    document = written(2, "image", "--out=/shared")
    document["spec"]["pytorchReplicaSpecs"]["Master"]["restart"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (("--out", "x"), {"image": ""}, "--image is missing"),
        ((), {}, "--out is missing"),
        (("--out", "x"), {"hosts": ("a",)}, "takes no --hosts"),
    ],
)
def test_what_is_missing_is_named(arguments: tuple[str, ...], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        written(2, *arguments, **fields)


def test_it_starts_nothing() -> None:
    with pytest.raises(RequestError, match="--dry-run"):
        KubernetesLauncher().check(LaunchRequest(arguments=(), workers=2))
