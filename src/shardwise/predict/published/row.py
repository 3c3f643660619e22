"""Reader of one row of a table of runs: model, strategy, software, cluster, and measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from shardwise.cluster.cluster import Cluster
from shardwise.options import FULL, NONE
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.profile.profile import Profile
from shardwise.predict.published import cells
from shardwise.predict.published.columns import MissingColumn, Row, degree, number, text, whole
from shardwise.predict.published.memory_kind import ReportedMemory, counted_of
from shardwise.predict.published.model_sizes import sizes_of
from shardwise.predict.published.row_cluster import cluster_of
from shardwise.predict.published.software_stack import runtime_of
from shardwise.predict.runtime.profile import transformer_profile
from shardwise.predict.runtime.runtime import Runtime
from shardwise.predict.runtime.sizes import Computation, Sizes
from shardwise.strategy import Strategy

DEEPEST = 10_000
"""Most layers of a model that is predicted."""

CROWDED = 1.2
"""Predicted memory divided by a device's from which on a run cannot have fitted: predictions are off by less."""

ASSUMED_SELECTIVE = "recompute selective, for without it the run does not fit"
"""Entry of `PublishedRun.assumed` for a run whose recomputation follows from its memory."""


@dataclass(frozen=True)
class PublishedRun:
    """A published run with its measurements.

    Attributes:
        line: line number in the file.
        group: group of the table's rows that it belongs to.
        label: description for display.
        sizes: sizes of the model.
        how: how one rank computed a microbatch, and the software.
        strategy: the split over ranks; those of context parallelism count as replicas.
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
    how: Computation
    strategy: Strategy
    cluster: Cluster
    step_seconds: float
    memory_bytes: float | None
    counted: ReportedMemory
    assumed: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        """Return the samples of a step; each rank of context parallelism has its part of a sequence as a sample."""
        return self.how.micro_batch * self.strategy.microbatches * self.strategy.replicas

    @cached_property
    def profile(self) -> Profile:
        """Return the profile of the run's step."""
        return transformer_profile(self.sizes, self.how, self.batch_size)


@dataclass(frozen=True, slots=True)
class _Degrees:
    """Degrees of tensor, pipeline, context and data parallelism, samples of a microbatch, and microbatches."""

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch: int
    microbatches: int

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


def read(row: Row, line: int) -> PublishedRun:
    """Read one row of a table.

    Raises:
        MissingColumn: something is missing, unknown or contradictory; the message names it.
        RequestError: the device cannot compute in the row's precision.
    """
    sizes, assumed = sizes_of(row)
    degrees = _degrees(row)
    how = _computation(row, degrees)
    strategy, unstated = _strategy(row, degrees, how)
    _check(sizes, strategy)
    cluster, unknown = cluster_of(row, degrees.devices)
    memory = number(row, "peak_mem_gib")
    run = PublishedRun(
        line=line,
        group=text(row, "group"),
        label=_label(row, degrees),
        sizes=sizes,
        how=_on_device(_without_full(how), cluster),
        strategy=strategy,
        cluster=cluster,
        step_seconds=_step_seconds(row, degrees, sizes),
        memory_bytes=memory * 2**30 if memory else None,
        counted=counted_of(row),
        assumed=(*assumed, *unstated, *unknown),
    )
    return _fitting(run)


def _fitting(run: PublishedRun) -> PublishedRun:
    """Assume selective recomputation for a run that had no room without, and has with it.

    Tables often say `none` where they mean that nothing is recomputed in full. What attention saves without a fused
    kernel is most of a block (Korthikanti et al. 2022, section 4), and what recomputing it takes is a tenth of a step.
    """
    if run.how.recompute != "none" or run.strategy.recompute == FULL or _crowding(run) <= CROWDED:
        return run
    with_it = replace(run, how=replace(run.how, recompute="selective"))
    return replace(with_it, assumed=(*run.assumed, ASSUMED_SELECTIVE)) if _crowding(with_it) <= 1 else run


def _crowding(run: PublishedRun) -> float:
    """Return the predicted memory of a run's tensors divided by the memory of a device."""
    return costs_of(run.profile, run.strategy, run.cluster).memory.tensors / run.cluster.device(0).memory_bytes


def _label(row: Row, at: _Degrees) -> str:
    degrees = {"tp": at.tensor, "pp": at.pipeline, "cp": at.context, "dp": at.data}
    written = " ".join(f"{name}={size}" for name, size in degrees.items() if size > 1 or name != "cp")
    model = text(row, "model") or "transformer"
    return f"{model} on {at.devices} {text(row, 'gpu')}, {written}, microbatch {at.micro_batch}"


def _step_seconds(row: Row, at: _Degrees, sizes: Sizes) -> float:
    """Return the measured seconds of a step, computed from the throughput if the row states only that."""
    for column in ("target_step_time_s", "step_time_s", "step_time_s_derived"):
        seconds = number(row, column)
        if seconds:
            return seconds
    throughput = number(row, "tokens_per_s_per_gpu")
    if throughput is None:
        raise MissingColumn("no target_step_time_s")
    samples = at.micro_batch * at.microbatches * at.data
    return samples * sizes.sequence / (throughput * at.devices)


def _on_device(how: Computation, cluster: Cluster) -> Computation:
    """Replace tf32 by float32 if the device does not support TensorFloat-32."""
    rates = cluster.device(0).flops
    if how.dtype == "tf32" and "tf32" not in rates and "float32" in rates:
        return replace(how, dtype="float32", linear_dtype="float32")
    return how


def _without_full(how: Computation) -> Computation:
    """Leave full recomputation to the strategy; what else software computes again is part of the profile."""
    return replace(how, recompute="none") if how.recompute == "full" else how


def _computation(row: Row, at: _Degrees) -> Computation:
    dtype, linear, scaling = cells.precision(text(row, "precision"))
    runtime = runtime_of(row, dtype)
    return Computation(
        tensor=at.tensor,
        context=at.context,
        sequence_parallel=_sequence_parallel(row, at.tensor, dtype, runtime),
        micro_batch=at.micro_batch,
        recompute=cells.recompute(text(row, "recompute")),
        dtype=dtype,
        linear_dtype=linear,
        scaling=scaling,
        runtime=runtime,
    )


def _strategy(row: Row, at: _Degrees, how: Computation) -> tuple[Strategy, list[str]]:
    """Return the strategy of a row, and a list of what the row does not say of it."""
    chunks = degree(row, "vpp")
    if chunks > 1 and at.pipeline == 1:
        raise MissingColumn(f"vpp is {chunks} without a pipeline (pp is 1)")
    zero_text = text(row, "zero_fsdp")
    replicas, zero = at.data * at.context, cells.zero(zero_text)
    shards = min(cells.shards(zero_text) or replicas, replicas) if zero == 3 else replicas if zero else 1
    strategy = Strategy(
        dp=replicas // shards,
        fsdp=shards,
        zero=3 if zero == 3 or shards == 1 else 1,
        tp=at.tensor,
        sp=int(how.sequence_parallel),
        pp=at.pipeline,
        microbatches=at.microbatches,
        schedule="interleaved" if chunks > 1 else cells.schedule(text(row, "schedule")) if at.pipeline > 1 else "1f1b",
        stages=chunks if chunks > 1 else 0,
        recompute=FULL if how.recompute == "full" else NONE,
        outermost="pp" if at.pipeline > 1 and replicas > 1 else "dp",
    )
    assumed = [f"{column} {value}" for column, value in (("zero_fsdp", "none"), ("recompute", "none"))]
    return strategy, [entry for entry in assumed if not _stated(text(row, entry.split()[0]))]


def _stated(cell: str) -> bool:
    return bool(cell) and not cell.lower().startswith("not stated")


def _degrees(row: Row) -> _Degrees:
    """Return the degrees, whose product is the number of GPUs, and the microbatches."""
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
    return _Degrees(tp, pp, cp, left, *_batch(row, left))


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


def _check(sizes: Sizes, strategy: Strategy) -> None:
    """Raise MissingColumn if the model's sizes contradict each other, or its layers are too many or too few."""
    if sizes.layers > DEEPEST:  # each of them is a segment of the profile
        raise MissingColumn(f"layers is {sizes.layers}, which no run has: write at most {DEEPEST}")
    stages = strategy.pp * strategy.stages_per_worker
    if stages > sizes.layers + 2:  # embedding and output may be stages of their own
        raise MissingColumn(f"{sizes.layers} layers are too few for the {stages} stages of pp x vpp")
    if sizes.heads % sizes.kv_heads:
        raise MissingColumn(f"{sizes.heads} heads do not share {sizes.kv_heads} kv_heads evenly")


def _sequence_parallel(row: Row, tp: int, dtype: str, runtime: Runtime) -> bool:
    words = " ".join(text(row, name) for name in ("zero_fsdp", "recompute", "notes", "source")).lower()
    if tp == 1 or dtype in ("tf32", "float32") or "no sequence parallel" in words:
        return False
    return "sequence parallel" in words or runtime.sequence_parallel
