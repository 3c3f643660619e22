"""Reader of one row of a table of runs: model sizes, training setup, cluster, and measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardwise.cluster.cluster import Cluster
from shardwise.predict.published import cells
from shardwise.predict.published.columns import MissingColumn, Row, degree, number, text, whole
from shardwise.predict.published.memory_kind import ReportedMemory, counted_of
from shardwise.predict.published.model_sizes import sizes_of
from shardwise.predict.published.predictor.sizes import Setup, Sizes
from shardwise.predict.published.row_cluster import cluster_of
from shardwise.predict.published.software_stack import stack_of


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """A published run with its measurements.

    Attributes:
        line: line number in the file.
        group: group of the table's rows that it belongs to.
        label: description for display.
        sizes: sizes of the model.
        setup: setup of the training.
        cluster: cluster that it ran on.
        step_seconds: measured time of a step.
        memory_bytes: measured peak memory; None if the row does not say.
        counted: kind of memory that the source reports.
        assumed: each thing that the row does not say, with the value assumed for it.
    """

    line: int
    group: str
    label: str
    sizes: Sizes
    setup: Setup
    cluster: Cluster
    step_seconds: float
    memory_bytes: float | None
    counted: ReportedMemory
    assumed: tuple[str, ...]


def read(row: Row, line: int) -> PublishedRun:
    """Read one row of a table.

    Raises:
        MissingColumn: something is missing, unknown or contradictory; the message names it.
    """
    sizes, assumed = sizes_of(row)
    setup, unstated = _setup(row)
    _check(sizes, setup)
    cluster, unknown = cluster_of(row, setup.devices)
    setup = _on_device(setup, cluster)
    memory = number(row, "peak_mem_gib")
    return PublishedRun(
        line=line,
        group=text(row, "group"),
        label=_label(row, setup),
        sizes=sizes,
        setup=setup,
        cluster=cluster,
        step_seconds=_step_seconds(row, setup, sizes),
        memory_bytes=memory * 2**30 if memory else None,
        counted=counted_of(row),
        assumed=(*assumed, *unstated, *unknown),
    )


def _label(row: Row, setup: Setup) -> str:
    degrees = {"tp": setup.tensor, "pp": setup.pipeline, "cp": setup.context, "dp": setup.data}
    written = " ".join(f"{name}={size}" for name, size in degrees.items() if size > 1 or name != "cp")
    model = text(row, "model") or "transformer"
    return f"{model} on {setup.devices} {text(row, 'gpu')}, {written}, microbatch {setup.micro_batch}"


def _step_seconds(row: Row, setup: Setup, sizes: Sizes) -> float:
    """Return the measured seconds of a step, computed from the throughput if the row states only that."""
    for column in ("target_step_time_s", "step_time_s", "step_time_s_derived"):
        seconds = number(row, column)
        if seconds:
            return seconds
    throughput = number(row, "tokens_per_s_per_gpu")
    if throughput is None:
        raise MissingColumn("no target_step_time_s")
    samples = setup.micro_batch * setup.microbatches * setup.data
    return samples * sizes.sequence / (throughput * setup.devices)


def _on_device(setup: Setup, cluster: Cluster) -> Setup:
    """Replace tf32 by float32 if the device does not support TensorFloat-32."""
    rates = cluster.device(0).flops
    if setup.dtype == "tf32" and "tf32" not in rates and "float32" in rates:
        return replace(setup, dtype="float32", linear_dtype="float32")
    return setup


def _setup(row: Row) -> tuple[Setup, list[str]]:
    dtype, linear, scaling = cells.precision(text(row, "precision"))
    tp, pp, cp, dp = _degrees(row)
    micro, microbatches = _batch(row, dp)
    chunks = degree(row, "vpp")
    if chunks > 1 and pp == 1:
        raise MissingColumn(f"vpp is {chunks} without a pipeline (pp is 1)")
    zero_text = text(row, "zero_fsdp")
    stack = stack_of(row, dtype)
    setup = Setup(
        tensor=tp,
        pipeline=pp,
        data=dp,
        context=cp,
        sequence_parallel=_sequence_parallel(row, tp, dtype, stack.elementwise),
        chunks=chunks,
        schedule=cells.schedule(text(row, "schedule")),
        zero=cells.zero(zero_text),
        shards=min(cells.shards(zero_text) or dp * cp, dp * cp),
        micro_batch=micro,
        microbatches=microbatches,
        recompute=cells.recompute(text(row, "recompute")),
        dtype=dtype,
        linear_dtype=linear,
        scaling=scaling,
        stack=stack,
    )
    assumed = [f"{column} {value}" for column, value in (("zero_fsdp", "none"), ("recompute", "none"))]
    return setup, [entry for entry in assumed if not _stated(text(row, entry.split()[0]))]


def _stated(cell: str) -> bool:
    return bool(cell) and not cell.lower().startswith("not stated")


def _degrees(row: Row) -> tuple[int, int, int, int]:
    """Return the degrees of tensor, pipeline, context and data parallelism; their product is the number of GPUs."""
    tp, pp, cp, dp = degree(row, "tp"), degree(row, "pp"), degree(row, "cp"), whole(row, "dp")
    gpus = whole(row, "n_gpus")
    if degree(row, "ep") > 1:
        raise MissingColumn("mixture of experts, whose number of experts no column says")
    if gpus is None and dp is None:
        raise MissingColumn("no n_gpus")
    if gpus is None:
        gpus = tp * pp * cp * (dp or 1)
    if gpus % (tp * pp * cp):
        raise MissingColumn(f"{gpus} GPUs are not a multiple of tp x pp x cp = {tp * pp * cp}")
    left = gpus // (tp * pp * cp)
    if dp not in (None, left, left * cp):  # some sources count context parallel ranks in dp
        raise MissingColumn(f"dp is {dp}, but {gpus} GPUs over tp x pp x cp = {tp * pp * cp} leave {left}")
    return tp, pp, cp, left


def _batch(row: Row, dp: int) -> tuple[int, int]:
    """Return (sequences per microbatch, microbatches), from two of microbatch, global batch and accumulation."""
    micro, batch, accumulated = whole(row, "micro_batch"), whole(row, "global_batch"), whole(row, "grad_accum")
    if batch is None:
        if micro is None or accumulated is None:
            raise MissingColumn("no global_batch")
        return micro, accumulated
    if micro is None:
        if accumulated is None:
            raise MissingColumn("no micro_batch")
        if batch % (accumulated * dp):
            raise MissingColumn(f"global_batch {batch} is no multiple of grad_accum x dp = {accumulated} x {dp}")
        return batch // (accumulated * dp), accumulated
    if batch % (micro * dp):
        raise MissingColumn(
            f"global_batch {batch} is no whole number of microbatches: micro_batch x dp = {micro} x {dp} = {micro * dp}"
        )
    return micro, batch // (micro * dp)


def _check(sizes: Sizes, setup: Setup) -> None:
    """Raise MissingColumn if the model's sizes contradict each other, or it has too few layers for its stages."""
    stages = setup.pipeline * setup.chunks
    if stages > sizes.layers + 2:  # embedding and output may be stages of their own
        raise MissingColumn(f"{sizes.layers} layers are too few for the {stages} stages of pp x vpp")
    if sizes.heads % sizes.kv_heads:
        raise MissingColumn(f"{sizes.heads} heads do not share {sizes.kv_heads} kv_heads evenly")


def _sequence_parallel(row: Row, tp: int, dtype: str, elementwise: str) -> bool:
    words = " ".join(text(row, name) for name in ("zero_fsdp", "recompute", "notes", "source")).lower()
    if tp == 1 or dtype in ("tf32", "float32") or "no sequence parallel" in words:
        return False
    return "sequence parallel" in words or elementwise in ("te", "compiled", "eager")
