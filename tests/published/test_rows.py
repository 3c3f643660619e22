"""Cells of a table of runs are read: many spellings, few assumptions, and a reason for what is not understood."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.predict.published import cells, device_names
from shardwise.predict.published.columns import MissingColumn, named, whole
from shardwise.predict.published.model_sizes import sizes_of
from shardwise.predict.published.row import ASSUMED_SELECTIVE, PublishedRun, read
from shardwise.predict.runtime.sizes import Computation
from shardwise.strategy import Strategy

ROW = {
    "model": "GPT-7B",
    "layers": "32",
    "hidden": "4096",
    "heads": "32",
    "ffn": "16384",
    "vocab": "50257",
    "seq_len": "2048",
    "gpu": "A100-80GB",
    "n_gpus": "16",
    "tp": "2",
    "pp": "2",
    "micro_batch": "2",
    "global_batch": "64",
    "precision": "bf16",
    "target_step_time_s": "1.5",
}


def run(**cells: str) -> PublishedRun:
    return read({**ROW, **cells}, 2)


def said(found: PublishedRun) -> tuple[Strategy, Computation]:
    return found.strategy, found.how


def reason(**cells: str) -> str:
    with pytest.raises(MissingColumn) as error:
        run(**cells)
    return str(error.value)


def test_few_columns_are_enough() -> None:
    found = run()
    assert found.strategy == Strategy(tp=2, sp=1, pp=2, dp=4, microbatches=8, schedule="1f1b", outermost="pp")
    assert (found.how.tensor, found.how.context, found.how.micro_batch, found.how.recompute) == (2, 1, 2, "none")
    assert found.batch_size == 64
    assert found.sizes.kv_heads == 32
    assert found.assumed == ("zero_fsdp none", "recompute none", "nodes of 8", "network of dgx-a100-80")
    assert found.label == "GPT-7B on 16 A100-80GB, tp=2 pp=2 dp=4, microbatch 2"


def test_columns_of_other_names() -> None:
    header = ["TP size", "Num layers", "hidden_size", "GPU", "GPUs", "mbs", "GBS", "Sequence length", "dtype", "odd"]
    assert list(named(header).values()) == [
        *("tp", "layers", "hidden", "gpu", "n_gpus", "micro_batch", "global_batch", "seq_len", "precision"),
        "odd",
    ]


def test_a_run_that_had_no_room_without_recomputation_recomputed() -> None:
    large = {"tp": "1", "pp": "1", "n_gpus": "8", "layers": "24", "micro_batch": "4", "recompute": "none"}
    found = run(**large, source="NeMo", zero_fsdp="ZeRO-1")
    assert found.how.recompute == "selective"
    assert found.assumed[-1] == ASSUMED_SELECTIVE
    stated = run(**{**large, "recompute": "full"}, source="NeMo", zero_fsdp="ZeRO-1")
    assert ASSUMED_SELECTIVE not in stated.assumed
    roomy = run(**large, source="NeMo", zero_fsdp="ZeRO-1", gpu="GB300")
    assert (roomy.how.recompute, ASSUMED_SELECTIVE in roomy.assumed) == ("none", False)
    in_vain = run(**{**large, "layers": "96"}, source="NeMo", zero_fsdp="ZeRO-1")  # does not fit with it, either
    assert (in_vain.how.recompute, ASSUMED_SELECTIVE in in_vain.assumed) == ("none", False)


def test_two_columns_that_mean_the_same() -> None:
    with pytest.raises(ValueError, match="columns 'mbs' and 'Micro batch size' both mean micro_batch"):
        named(["mbs", "Micro batch size"])
    assert named(["model", "model_name"]) == {"model": "model", "model_name": "model_name"}


@pytest.mark.parametrize("cell", ["", " ", "-", "n/a", "None", "not stated", "?", "unknown"])
def test_empty_cells(cell: str) -> None:
    assert said(run(kv_heads=cell, vpp=cell, cp=cell, gpus_per_node=cell)) == said(run())


@pytest.mark.parametrize(("cell", "value"), [("1,536", 1536), ("8.0", 8), (" 12 ", 12), ("1e3", 1000)])
def test_numbers(cell: str, value: int) -> None:
    assert whole({"n_gpus": cell}, "n_gpus") == value


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A100", "NVIDIA A100 SXM4 80GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM4 40GB"),
        ("a100_40g", "NVIDIA A100 SXM4 40GB"),
        ("A100 40GB PCIe", "NVIDIA A100 PCIe 40GB"),
        ("8xH100 SXM5 80GB HBM3", "NVIDIA H100 SXM5 80GB"),
        ("H100-96GB-HBM2e-500W", "NVIDIA H100 96GB HBM2e 500W"),
        ("V100-16GB (p3.16xlarge)", "NVIDIA V100 SXM2 16GB"),
        ("Tesla V100-SXM2-32GB", "NVIDIA V100 SXM2 32GB"),
        ("GeForce RTX 4090 24GB", "NVIDIA GeForce RTX 4090"),
        ("AMD Instinct MI300X", "AMD Instinct MI300X"),
        ("GB200 NVL72", "NVIDIA GB200 186GB"),
        ("DGX B200", "NVIDIA B200 180GB"),
        ("p4d.24xlarge", "NVIDIA A100 SXM4 40GB"),
    ],
)
def test_devices(text: str, name: str) -> None:
    assert device_names.find(text).name == name


@pytest.mark.parametrize("text", ["TPU v4", "H1000", "Titan V"])
def test_unknown_devices(text: str) -> None:
    with pytest.raises(MissingColumn, match="unknown gpu"):
        device_names.find(text)


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [
        ("bf16", ("bf16", "bf16", "")),
        ("amp_bf16", ("bf16", "bf16", "")),
        ("BF16 mixed", ("bf16", "bf16", "")),
        ("bfloat16", ("bf16", "bf16", "")),
        ("bf16 (fp32 master weights)", ("bf16", "bf16", "")),
        ("fp16", ("fp16", "fp16", "")),
        ("float16", ("fp16", "fp16", "")),
        ("mixed precision (fp16/fp32)", ("fp16", "fp16", "")),
        ("half", ("fp16", "fp16", "")),
        ("FP32", ("tf32", "tf32", "")),
        ("tf32", ("tf32", "tf32", "")),
        ("fp32 or fp16 not stated (4-byte elements)", ("tf32", "tf32", "")),
        ("FP8", ("bf16", "fp8", "delayed")),
        ("fp8 (E4M3)", ("bf16", "fp8", "delayed")),
        ("FP8-CS", ("bf16", "fp8", "current")),
        ("MXFP8", ("bf16", "fp8", "block")),
        ("float8 tensorwise", ("bf16", "fp8", "current")),
        ("NVFP4", ("bf16", "fp4", "block")),
    ],
)
def test_precisions(text: str, dtypes: tuple[str, str, str]) -> None:
    assert cells.precision(text) == dtypes


def test_single_precision_without_tensorfloat32() -> None:
    assert run(gpu="V100", precision="fp32").how.dtype == "float32"
    assert run(gpu="A100", precision="fp32").how.dtype == "tf32"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", "none"),
        ("none", "none"),
        ("No", "none"),
        ("false", "none"),
        ("not stated (nanotron default none)", "none"),
        ("full", "full"),
        ("Full (uniform, 1 layer)", "full"),
        ("yes", "full"),
        ("every layer", "full"),
        ("full (use_checkpoint true)", "full"),
        ("selective", "selective"),
        ("selective + sequence parallel", "selective"),
        ("selective op", "operations"),
        ("selective layer", "layers"),
    ],
)
def test_recompute(text: str, value: str) -> None:
    assert cells.recompute(text) == value


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("", 0),
        ("none (plain DP allreduce)", 0),
        ("none/ZeRO not stated", 0),
        ("DDP", 0),
        ("ZeRO-1", 1),
        ("zero1", 1),
        ("ZeRO stage 2", 2),
        ("2", 2),
        ("DeepSpeed stage-3", 3),
        ("distributed optimizer", 1),
        ("ZeRO-1 (distributed optimizer)", 1),
        ("SHARD_GRAD_OP", 2),
        ("FSDP FULL_SHARD", 3),
        ("FSDP2", 3),
        ("HSDP 8", 3),
        ("Megatron-FSDP over 64", 3),
    ],
)
def test_zero(text: str, stage: int) -> None:
    assert cells.zero(text) == stage


@pytest.mark.parametrize(
    ("text", "value"),
    [("", "1f1b"), ("1F1B", "1f1b"), ("interleaved 1F1B", "1f1b"), ("PipeDream-Flush", "1f1b"), ("GPipe", "gpipe")],
)
def test_schedules(text: str, value: str) -> None:
    assert cells.schedule(text) == value


def test_hybrid_shards() -> None:
    few, all_of_them = (run(zero_fsdp=zero, tp="1", pp="1", global_batch="64").strategy for zero in ("HSDP 2", "FSDP"))
    assert (few.dp, few.fsdp, few.zero) == (8, 2, 3)
    assert (all_of_them.dp, all_of_them.fsdp, all_of_them.zero) == (1, 16, 3)


@pytest.mark.parametrize(
    ("zero", "shards", "stage", "sharded"),
    [("none", 1, 3, False), ("ZeRO-1", 4, 1, False), ("ZeRO-2", 4, 1, True), ("ZeRO-3", 4, 3, False)],
)
def test_optimizer_states_are_split(zero: str, shards: int, stage: int, sharded: bool) -> None:
    """Beside an optimizer state that is split, ZeRO-2 keeps a part of the gradients; the strategy is that of zero=1."""
    found = run(zero_fsdp=zero)
    assert (found.strategy.fsdp, found.strategy.zero, found.how.runtime.sharded_gradients) == (shards, stage, sharded)


def test_ranks_of_context_parallelism_count_as_replicas() -> None:
    found, plain = run(cp="2", pp="1"), run(pp="1")
    assert (found.strategy.tp, found.strategy.dp, found.how.context) == (2, 8, 2)
    assert found.batch_size == 2 * 64  # half a sample each

    def flops(each: PublishedRun) -> float:
        return each.profile.flops * each.strategy.microbatches * each.strategy.replicas

    assert flops(found) == pytest.approx(flops(plain), rel=0.001)


def test_interleaved_schedules() -> None:
    strategy = run(vpp="4").strategy
    assert (strategy.schedule, strategy.stages_per_worker) == ("interleaved", 4)
    assert run(schedule="gpipe").strategy.schedule == "gpipe"


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        ({}, "accelerate"),
        ({"precision": "fp16"}, "megatron-2021"),
        ({"precision": "fp16", "source": "Korthikanti et al."}, "megatron-2022"),
        ({"source": "BigScience BLOOM"}, "megatron-deepspeed"),
        ({"source": "NVIDIA NeMo", "gpu": "H100-80GB"}, "megatron"),
        ({"source": "NVIDIA NeMo"}, "nemo-ampere"),
        ({"source": "huggingface/nanotron"}, "nanotron"),
        ({"source": "mosaicml/llm-foundry"}, "llm-foundry"),
        ({"compile": "yes"}, "torchtitan"),
    ],
)
def test_software(cells: dict[str, str], name: str) -> None:
    assert run(**cells).how.runtime.name == name


@pytest.mark.parametrize(
    ("cells", "bytes_each"),
    [
        ({}, (4, 4, 2)),
        ({"precision": "pure bf16"}, (2, 4, 2)),
        ({"precision": "fp16"}, (2, 2, 2)),
        ({"precision": "fp32"}, (4, 4, 4)),
    ],
)
def test_bytes_of_gradients(cells: dict[str, str], bytes_each: tuple[int, int, int]) -> None:
    runtime = run(**cells).how.runtime
    assert (runtime.gradient_bytes, runtime.accumulation_bytes, runtime.gathered_bytes) == bytes_each


def test_notes_tell_of_the_software() -> None:
    assert run(notes="CUDA graphs").how.runtime.graphs
    after_passes = run(source="nanotron", zero_fsdp="ZeRO-1").how.runtime
    assert not after_passes.overlap_gradients
    assert run(source="nanotron").how.runtime.overlap_gradients
    assert run(precision="fp16", notes="gradient reduction (overlapped)").how.runtime.overlap_gradients
    assert not run(precision="fp16", notes="gradient reduction (not overlapped)").how.runtime.overlap_gradients


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [
        ("Selene: NVLink3 + 8x200Gb HDR IB per node", 200e9),
        ("800 Gbps per node", 100e9),
        ("4x Omni-Path 100Gb per node; all-reduce busbw 40.5 Gbps", 50e9),
        ("EFA 3200 Gbps", 400e9),
        ("RDMA 400Gb/s per GPU", -50e9),
        ("NVLink (single node)", None),
    ],
)
def test_networks(text: str, bandwidth: float | None) -> None:
    assert cells.node_bandwidth(text) == bandwidth


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVLink; 4x Omni-Path 100Gb per node", "omni-path-100"),
        ("EFA 3200 Gbps", "efa"),
        ("8x200Gb HDR IB per node", "infiniband-ndr"),
        ("RoCE 1600 Gbps/node", "roce-400"),
        ("NVLink (single node)", ""),
    ],
)
def test_kinds_of_networks(text: str, name: str) -> None:
    assert cells.network(text) == name


def test_links_between_devices() -> None:
    assert run(interconnect="NVLink (4-link) in node").cluster.levels[0].bandwidth == 100e9
    assert run(interconnect="NVSwitch").cluster.levels[0].bandwidth == 300e9
    assert run(interconnect="EFA 3200 Gbps").cluster.levels[1].bandwidth == 50e9
    assert run(interconnect="HF cluster").cluster.levels[1].name == "efa"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"n_gpus": "12", "tp": "8"}, "12 GPUs are not a multiple of tp x pp x cp = 16"),
        ({"dp": "8"}, "dp is 8, but 16 GPUs over tp x pp x cp = 4 leave 4"),
        ({"global_batch": "60"}, "global_batch 60 is no whole number of microbatches: micro_batch x dp = 2 x 4 = 8"),
        ({"global_batch": "4"}, "global_batch 4 is no whole number of microbatches"),
        ({"global_batch": ""}, "no global_batch"),
        ({"micro_batch": ""}, "no micro_batch"),
        ({"n_gpus": ""}, "no n_gpus"),
        ({"ep": "8"}, "mixture of experts"),
        ({"params_b": "46.7"}, "a mixture of experts?"),
        ({"vpp": "2", "pp": "1"}, "vpp is 2 without a pipeline"),
        ({"precision": ""}, "no precision"),
        ({"precision": "int8"}, "precision is 'int8'; write bf16"),
        ({"recompute": "sometimes"}, "recompute is 'sometimes'; write none, selective"),
        ({"zero_fsdp": "magic"}, "zero_fsdp is 'magic'; write none, ZeRO-1"),
        ({"schedule": "DualPipe"}, "schedule is 'DualPipe'; write 1f1b"),
        ({"heads": "30"}, "heads is 30, which does not divide hidden 4096"),
        ({"target_step_time_s": "fast"}, "target_step_time_s is 'fast', not a number"),
        ({"layers": "1e9"}, "layers is 1000000000, which no run has: write at most 10000"),
        ({"layers": "12.5"}, "layers is 12.5, not a whole number"),
        ({"ffn": "", "vocab": ""}, "no ffn, vocab"),
    ],
)
def test_what_is_not_understood(cells: dict[str, str], expected: str) -> None:
    assert expected in reason(**cells)


def test_two_of_three_say_the_batch() -> None:
    plain = said(run())
    assert said(run(global_batch="", grad_accum="8")) == plain
    assert said(run(micro_batch="", grad_accum="8")) == plain
    assert said(run(n_gpus="", dp="4")) == plain
    assert "no multiple of grad_accum x dp = 5 x 4" in reason(micro_batch="", grad_accum="5")


def test_throughput_says_the_time() -> None:
    found = run(target_step_time_s="", tokens_per_s_per_gpu="4096")
    assert found.step_seconds == 64 * 2048 / (4096 * 16)


def test_model_known_by_name_says_what_is_missing() -> None:
    empty: dict[str, Any] = dict.fromkeys(("layers", "hidden", "heads", "ffn", "vocab"), "")
    found = run(**empty, model="LLAMA3_8B")
    assert (found.sizes.layers, found.sizes.ffn, found.sizes.kv_heads) == (32, 14336, 8)
    assert (found.sizes.gated, found.sizes.tied) == (True, False)
    assert "layers of Llama3-8B" in found.assumed


def test_parameters_tell_gate_and_ties() -> None:
    # 131,072 x 2,048 parameters of an output are as many as the gates of 16 blocks: the family decides
    llama = {**ROW, "model": "Llama-like 1.34B", "params_b": "1.34", "layers": "16", "hidden": "2048"}
    sizes, _ = sizes_of({**llama, "ffn": "8192", "vocab": "131072"})
    assert (sizes.gated, sizes.tied) == (True, True)
    sizes, _ = sizes_of({**ROW, "params_b": "6.86"})
    assert (sizes.gated, sizes.tied) == (False, False)
    sizes, _ = sizes_of({**ROW, "params_b": "6.65"})
    assert (sizes.gated, sizes.tied) == (False, True)
