"""Peak memory that Megatron-LM's own tests record (memory_megatron.csv): tensors allocated on the last rank."""

from __future__ import annotations

import csv
import statistics
from math import ceil
from pathlib import Path

import pytest

from shardwise.predict.published.predictor.memory import memory_of_stage
from shardwise.predict.published.predictor.sizes import Setup, Sizes, Stack

ROWS = Path(__file__).with_name("memory_megatron.csv")
NODE = 8
"""GPUs where the file does not say how many."""

Row = dict[str, str]


def number(row: Row, column: str, default: int = 1) -> int:
    return int(row[column] or default)


def chosen(row: Row, attention: str) -> bool:
    """Dense GPTs in half precision whose attention is known: fused with Transformer Engine on A100 in newer images,
    unfused in Megatron's own layers."""
    name = row["test"].split("/")[-1]
    dense = name.startswith("gpt3_mcore") and not row["experts"] and row["mem_max_alloc_gib"] and row["layers"] == "12"
    plain = not row["fp8"] and row["fsdp"] != "True" and row["hidden"] == "512"
    special = ("frozen", "tunable", "swiglu", "cross_entropy", "defer", "uneven", "multi_dist", "mla")
    if not dense or not plain or any(word in name for word in special):
        return False
    if attention == "unfused":
        return name.startswith("gpt3_mcore_tp")
    return name.startswith("gpt3_mcore_te") and row["golden"] == "golden_values_dev_dgx_a100.json" and "resume" in name


def sizes_of(row: Row) -> Sizes:
    tensor, hidden, heads = number(row, "tp"), number(row, "hidden"), number(row, "heads")
    return Sizes(
        layers=number(row, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        ffn=4 * hidden,
        vocab=128 * tensor * ceil(50257 / (128 * tensor)),
        sequence=number(row, "seq"),
        gated=False,
        tied=True,
        learned_positions=True,
        biases=True,
    )


def setup_of(row: Row, attention: str) -> Setup:
    tensor, pipeline, context, micro = (number(row, name) for name in ("tp", "pp", "cp", "mbs"))
    nodes, per_node = (int(part) for part in (row["nodes_gpus"] or f"1x{NODE}").split("x"))
    data = max(1, nodes * per_node // (tensor * pipeline * context))
    chunks = number(row, "layers") // pipeline // int(row["vpp_layers"]) if row["vpp_layers"] else number(row, "vpp")
    dtype = "fp16" if row["fp16"] else "bf16"
    stack = Stack(
        attention=attention,
        elementwise="megatron",
        loss="fused",
        dropout=True,
        overlap_gradients=True,
        overlap_parameters=True,
        overlap_tensor=False,
        overlap_pipeline=False,
        scatter_pipeline=False,
        graphs=False,
        gradient_bytes=4,
        accumulation_bytes=4,
    )
    return Setup(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        sequence_parallel=row["sp"] == "True" and tensor > 1,
        chunks=chunks,
        zero=1 if row["dist_opt"] else 0,
        shards=data * context,
        micro_batch=micro,
        microbatches=max(1, number(row, "gbs") // (micro * data)),
        recompute="full" if row["recompute"].startswith("full") else "none",
        dtype=dtype,
        linear_dtype=dtype,
        scaling="",
        stack=stack,
    )


@pytest.mark.parametrize(("attention", "least"), [("fused", 12), ("unfused", 12)])
def test_peak_memory(attention: str, least: int) -> None:
    with ROWS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if chosen(row, attention)]
    errors = {}
    for row in rows:
        setup = setup_of(row, attention)
        predicted = memory_of_stage(sizes_of(row), setup, setup.pipeline - 1).total
        errors[row["path"]] = predicted / (float(row["mem_max_alloc_gib"]) * 2**30) - 1
    assert len(errors) >= least
    assert statistics.fmean(abs(error) for error in errors.values()) < 0.05, errors
