"""One row of a table of runs: what it says, as sizes, a setup and a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster, Nodes
from shardwise.predict.published import devices, spelling
from shardwise.predict.published.lacking import Lacking
from shardwise.predict.transformer.sizes import Setup, Sizes, Stack

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was measured.

    Attributes:
        line: of the file.
        group: of the table.
        label: for people.
        sizes: of the model.
        setup: of the training.
        cluster: that it ran on.
        step_seconds: measured.
        memory_bytes: measured, None where the row does not say.
    """

    line: int
    group: str
    label: str
    sizes: Sizes
    setup: Setup
    cluster: Cluster
    step_seconds: float
    memory_bytes: float | None


def read(row: Row, line: int) -> Run:
    """Understands one row.

    Raises:
        Lacking: says what is missing or unknown.
    """
    sizes = _sizes(row)
    setup = _setup(row, sizes)
    seconds = _number(row, "target_step_time_s", needed=False) or _number(row, "step_time_s", needed=False)
    seconds = seconds or _number(row, "step_time_s_derived", needed=False)
    if not seconds:
        raise Lacking("no target_step_time_s")
    memory = _number(row, "peak_mem_gib", needed=False)
    label = (
        f"{row.get('model', '')} on {row['n_gpus']} {row['gpu']}, tp={setup.tensor} pp={setup.pipeline} dp={setup.data}"
    )
    return Run(
        line, row.get("group") or "", label, sizes, setup, _cluster(row), seconds, memory * 2**30 if memory else None
    )


def _number(row: Row, column: str, *, needed: bool = True, default: float = 0.0) -> float:
    text = (row.get(column) or "").strip()
    if not text:
        if needed:
            raise Lacking(f"no {column}")
        return default
    try:
        value = float(text)
    except ValueError:
        raise Lacking(f"{column} is {text!r}, not a number") from None
    if value <= 0:
        raise Lacking(f"{column} is {text}, not positive")
    return value


def _whole(row: Row, column: str, *, default: int | None = None) -> int:
    value = _number(row, column, needed=default is None, default=float(default or 0))
    if value != int(value):
        raise Lacking(f"{column} is {value}, not a whole number")
    return int(value)


def _sizes(row: Row) -> Sizes:
    hidden, heads = _whole(row, "hidden"), _whole(row, "heads")
    learned = (
        "gpt" in row.get("model", "").lower()
        or "mpt" in row.get("model", "").lower()
        or "opt" in row.get("model", "").lower()
    )
    plain: dict[str, Any] = {
        "layers": _whole(row, "layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _whole(row, "kv_heads", default=heads),
        "ffn": _whole(row, "ffn"),
        "vocab": _whole(row, "vocab"),
        "sequence": _whole(row, "seq_len"),
        "learned_positions": learned,
        "biases": learned,
    }
    stated = _number(row, "params_b", needed=False)
    candidates = [Sizes(**plain, gated=gated, tied=tied) for gated in (False, True) for tied in (True, False)]
    if not stated:
        gated = plain["ffn"] != 4 * hidden
        return next(s for s in candidates if s.gated == gated and s.tied)
    return min(candidates, key=lambda s: abs(s.parameters / (stated * 1e9) - 1))


def _setup(row: Row, sizes: Sizes) -> Setup:
    found = spelling.precision(row.get("precision") or "")
    if found is None:
        raise Lacking(f"no known precision in {row.get('precision')!r}")
    dtype, linear, scaling = found
    tp, pp, cp = _whole(row, "tp", default=1), _whole(row, "pp", default=1), _whole(row, "cp", default=1)
    gpus = _whole(row, "n_gpus")
    if _whole(row, "ep", default=1) > 1:
        raise Lacking("mixture of experts, whose number of experts no column says")
    dp = gpus // (tp * pp * cp)
    batch, micro = _whole(row, "global_batch"), _whole(row, "micro_batch")
    microbatches = batch / (micro * dp)
    if tp * pp * cp * dp != gpus:
        raise Lacking(f"{gpus} GPUs are not a multiple of tp x pp x cp = {tp * pp * cp}")
    if microbatches != int(microbatches) or microbatches < 1:
        microbatches = max(1, round(microbatches))
    zero_text = row.get("zero_fsdp") or ""
    zero = spelling.zero(zero_text)
    stack = _stack(row, dtype, linear, zero)
    text = f"{zero_text} {row.get('recompute')} {row.get('notes')} {row.get('source')}".lower()
    sequence_parallel = (
        tp > 1
        and ("no sequence parallel" not in text)
        and ("sequence parallel" in text or stack.elementwise in ("te", "compiled", "eager"))
        and dtype not in ("tf32", "float32")
    )
    return Setup(
        tensor=tp,
        pipeline=pp,
        data=dp,
        context=cp,
        sequence_parallel=sequence_parallel,
        chunks=_whole(row, "vpp", default=1),
        zero=zero,
        shards=spelling.shards(zero_text) or dp * cp,
        micro_batch=micro,
        microbatches=int(microbatches),
        recompute=spelling.recompute(row.get("recompute") or ""),
        dtype=dtype,
        linear_dtype=linear,
        scaling=scaling,
        stack=stack,
    )


def _stack(row: Row, dtype: str, linear: str, zero: int) -> Stack:
    source = f"{row.get('source')} {row.get('group')} {row.get('compile')} {row.get('notes')}".lower()
    deepspeed = any(word in source for word in ("deepspeed", "bigscience", "bloom", "vtrain", "sailor"))
    old = dtype in ("fp16", "tf32", "float32") or deepspeed
    compiled = (row.get("compile") or "").lower().startswith("yes")
    nemo = any(word in source for word in ("nemo", "megatron-bridge", "transformer engine")) or "TE" in (
        row.get("compile") or ""
    )
    if old or (nemo and "a100" in (row.get("gpu") or "").lower()):
        elementwise, attention, loss = "megatron", "unfused", "megatron"
    elif nemo:
        elementwise, attention, loss = "te", "fused", "fused"
    elif compiled:
        elementwise, attention, loss = "compiled", "flash", "eager"
    else:
        elementwise, attention, loss = "eager", "flash", "eager"
    accumulation = 2 if dtype == "fp16" else 4
    gradient = 2 if dtype == "fp16" else 4
    if dtype == "bf16" and "pure" in (row.get("precision") or ""):
        gradient = 2
    overlap = not old or ("overlapped)" in source and "not overlapped" not in source)
    return Stack(
        attention=attention,
        elementwise=elementwise,
        loss=loss,
        dropout=old,
        overlap_gradients=overlap,
        overlap_parameters=nemo,
        overlap_tensor=nemo,
        overlap_pipeline=nemo,
        scatter_pipeline=old and not deepspeed,
        graphs="graph" in source,
        gradient_bytes=gradient,
        accumulation_bytes=accumulation,
        causal="llm-foundry" not in source,
        bucketed=elementwise != "eager",
    )


def _cluster(row: Row) -> Cluster:
    """The row's devices in their nodes; what the row does not say is as in the node that the device is sold in."""
    device = devices.find(row.get("gpu") or "")
    gpus = _whole(row, "n_gpus")
    kind = catalogue.node(devices.sold_in(device))
    node = min(gpus, _whole(row, "gpus_per_node", default=kind.devices))
    text = row.get("interconnect") or ""
    inner, network = kind.links[0], kind.links[-1]
    links = catalogue.link(inner.link, span=node)
    span = spelling.nvlink_domain(text) or max(node, inner.span or 0)
    total = max(gpus, span)
    outer = catalogue.link(network.link, span=total)
    stated = spelling.node_bandwidth(text)
    if stated is None:
        per_device = outer.bandwidth * (network.ports or kind.devices) / kind.devices
    else:
        per_device = -stated if stated < 0 else stated / _whole(row, "gpus_per_node", default=kind.devices)
    levels = (replace(links, span=span), replace(outer, bandwidth=per_device))
    return Cluster(name=text, nodes=(Nodes(device, node, -(-gpus // node)),), levels=levels)
