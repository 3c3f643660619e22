"""`gpt:layers=...`: a model by its sizes."""

from __future__ import annotations

import math

import pytest
import torch

from shardwise.errors import WorkloadError
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.models.gpt import GPT

SPEC = "gpt:layers=2,hidden=64,heads=4,kv_heads=2,ffn=96,vocabulary=300,sequence=16"


def test_model_has_the_sizes() -> None:
    workload = load_workload(SPEC, {"batch_size": "4"})
    model = workload.model()
    block = 64 + 64 * (64 + 2 * 2 * 16) + 64 * 64 + 64 + 3 * 64 * 96
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * 300 * 64 + 2 * block + 64
    tokens = torch.stack([workload.dataset[i]["tokens"] for i in range(4)])
    output = model(workload.inputs({"tokens": tokens}))
    assert output.shape == (4, 16, 300)
    assert workload.loss(output, {"tokens": tokens}).item() == pytest.approx(math.log(300), rel=0.1)
    assert (workload.batch_size, workload.precision) == (4, "bf16")


def test_sizes_may_be_settings() -> None:
    workload = load_workload("gpt:layers=2,sequence=16", {"hidden": "64", "heads": 4, "layers": "3"})
    model = workload.model()
    assert isinstance(model, GPT)
    assert len(model.blocks) == 3
    assert model.head.in_features == 64


def test_width_without_ffn_keeps_the_parameters_of_two_matrices() -> None:
    model = load_workload("gpt:layers=1,hidden=192,heads=4,vocabulary=256").model()
    assert isinstance(model, GPT)
    block = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert block == 12 * 192**2 + 2 * 192


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt:", "needs a value for 'layers', 'hidden', 'heads': give them with --set layers=VALUE"),
        ("gpt:layers=2,hidden=64", "needs a value for 'heads': give it with --set heads=VALUE"),
        ("gpt:layer=2,hidden=64,heads=4", "no parameter 'layer'.*did you mean 'layers'"),
        ("gpt:layers=2,hidden=64,heads", "'heads' in workload .* has no value"),
        ("gpt:layers=2,layers=3,hidden=64,heads=4", "layers is given twice"),
        ("gpt:layers=two,hidden=64,heads=4", "layers=two: must be a whole number"),
        ("gpt:layers=2,hidden=60,heads=4", "hidden=60: use 56 or 64"),
        ("gpt:layers=2,hidden=64,heads=4,kv_heads=3", "kv_heads=3: must divide heads=4; use one of 1, 2, 4"),
        ("gpt:layers=2,hidden=64,heads=4,vocabulary=100", "vocabulary=100.*use 256 or more"),
    ],
)
def test_mistakes(spec: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_workload(spec)
