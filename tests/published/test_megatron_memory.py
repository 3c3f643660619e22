"""Peak memory that Megatron-LM's own tests record (memory_megatron.csv): tensors allocated on the last rank."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from shardwise.cluster import catalogue
from shardwise.options import FULL, NONE
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.runtime import known
from shardwise.predict.runtime.profile import transformer_profile
from shardwise.predict.runtime.sizes import Computation, Sizes
from shardwise.strategy import Strategy

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


def strategy_of(row: Row) -> Strategy:
    """Return the split of a row's ranks; those of context parallelism are replicas."""
    tensor, pipeline = number(row, "tp"), number(row, "pp")
    nodes, per_node = (int(part) for part in (row["nodes_gpus"] or f"1x{NODE}").split("x"))
    replicas = max(1, nodes * per_node // (tensor * pipeline))
    chunks = number(row, "layers") // pipeline // int(row["vpp_layers"]) if row["vpp_layers"] else number(row, "vpp")
    data = max(1, replicas // number(row, "cp"))
    return Strategy(
        dp=1 if row["dist_opt"] else replicas,
        fsdp=replicas if row["dist_opt"] else 1,
        zero=1 if row["dist_opt"] and replicas > 1 else 3,
        tp=tensor,
        sp=int(row["sp"] == "True" and tensor > 1),
        pp=pipeline,
        microbatches=max(1, number(row, "gbs") // (number(row, "mbs") * data)),
        schedule="interleaved" if chunks > 1 else "1f1b",
        stages=chunks if chunks > 1 else 0,
        recompute=FULL if row["recompute"].startswith("full") else NONE,
        outermost="pp" if pipeline > 1 and replicas > 1 else "dp",
    )


def costs_of_row(row: Row, attention: str) -> Costs:
    strategy, dtype = strategy_of(row), "fp16" if row["fp16"] else "bf16"
    runtime = replace(
        known.MEGATRON_CORE,
        attention=attention,
        elementwise="megatron",
        dropout=True,
        fused_accumulation=False,
        padded=False,
        gradient_bytes=4,
    )
    how = Computation(
        tensor=strategy.tp,
        context=number(row, "cp"),
        sequence_parallel=bool(strategy.sp),
        micro_batch=number(row, "mbs"),
        recompute="none",
        dtype=dtype,
        linear_dtype=dtype,
        scaling="",
        runtime=runtime,
    )
    batch = how.micro_batch * strategy.microbatches * strategy.replicas
    return costs_of(transformer_profile(sizes_of(row), how, batch), strategy, catalogue.cluster("a100"))


@pytest.mark.parametrize(("attention", "least"), [("fused", 12), ("unfused", 12)])
def test_peak_memory(attention: str, least: int) -> None:
    with ROWS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if chosen(row, attention)]
    errors = {}
    for row in rows:
        costs = costs_of_row(row, attention)
        predicted = costs.memory_at(costs.parts.workers[-1]).tensors
        errors[row["path"]] = predicted / (float(row["mem_max_alloc_gib"]) * 2**30) - 1
    assert len(errors) >= least
    assert statistics.fmean(abs(error) for error in errors.values()) < 0.03, errors
