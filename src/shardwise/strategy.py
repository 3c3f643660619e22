"""Parallel strategies: the immutable value that says how a training step is split over workers.

    >>> Strategy.parse("dp=2,tp=2").workers
    4
    >>> str(Strategy.parse("tp=2, pp=2, microbatches=8, schedule=1f1b"))
    'tp=2,pp=2,microbatches=8'

Axes, outermost first: `dp` (replicas), `fsdp` (replicas that shard parameters), `pp` (stages), `tp` (layer shards).
`tp` varies fastest over the ranks, because its messages are the most frequent. With `outermost=pp` stages vary slowest:
they lie on different hosts, and the replicas of a stage are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import gcd, isqrt
from operator import attrgetter
from typing import Any

from shardwise.errors import StrategyError, nearest
from shardwise.options import (
    BF16,
    EQUAL,
    FULL,
    MOST,
    NONE,
    PRECISIONS,
    SELECTIVE,
    SYNCHRONOUS,
    UNCOMPRESSED,
    Compression,
    Ratio,
    Recompute,
    Staleness,
    dtype_of,
)
from shardwise.units import parse_whole

PIPEDREAM = "pipedream"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble", PIPEDREAM)
_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"
PRODUCTS = {
    "aten.mm": ("linear", "mm", "matmul"),
    "aten.addmm": ("addmm",),
    "aten.convolution": tuple(_CONVOLUTIONS.split()),
    "aten._scaled_dot_product_flash_attention_for_cpu": ("_scaled_dot_product_flash_attention_for_cpu",),
    "aten._scaled_dot_product_flash_attention": ("scaled_dot_product_attention",),
    "aten._scaled_dot_product_efficient_attention": ("scaled_dot_product_attention",),
    "aten._scaled_dot_product_cudnn_attention": ("scaled_dot_product_attention",),
}
"""Operations whose results `recompute=selective` saves, as torch dispatches them -> names of those in a traced graph
that become them: matmuls with weights, convolutions and fused attention.

The matmul of two activations (`bmm`) is recomputed: it occurs in unfused attention, and its results are large.
"""
OUTERMOST = ("dp", "pp")
CHANGES = ("lossy", "async")
"""Ways in which training may differ from that of one process: updates are others, or workers do not wait."""
OUTER = ("average", "nesterov")
SUGGESTED = 16
"""Largest number of values that a message suggests."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "reduce": (BF16,),
    "outermost": OUTERMOST,
    "outer": OUTER,
}
_INTEGERS = (
    "dp",
    "fsdp",
    "zero",
    "tp",
    "sp",
    "pp",
    "microbatches",
    "stages",
    "bucket",
    "offload",
    "compile",
    "loss_pieces",
    "states",
    "plain_steps",
    "local",
    "fragments",
    "delay",
    "ps",
)
_WHOLE = attrgetter(*_INTEGERS)
"""Function that returns all whole numbers of a strategy at once: a search makes a hundred thousand strategies."""
_TEXTS = ("schedule", "precision", "reduce", "outermost", "outer")
_MAY_BE_EMPTY = ("precision", "reduce")
_VALUES: dict[str, type[Recompute | Ratio | Compression | Staleness]] = {
    "recompute": Recompute,
    "shares": Ratio,
    "speeds": Ratio,
    "compress": Compression,
    "staleness": Staleness,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Parallel strategy: one way to split a training step over workers; immutable, and checked when it is made.

    `recompute`, `shares`, `speeds` and `compress` may be given as they are spelled, and are values from then on.

    Attributes:
        dp: number of replicas of the model, each with its share of the batch (torch DDP).
        fsdp: number of replicas that also shard the parameters between them (ZeRO; Rajbhandari et al. 2020).
        zero: state that `fsdp` shards: 1 optimizer state, 2 also gradients, 3 also parameters.
        tp: number of shards of each layer (Megatron-LM; Shoeybi et al. 2019).
        sp: 1 splits activations between sharded layers along the sequence (Korthikanti et al. 2022); needs `tp`.
        pp: number of pipeline workers, each with its share of the layers.
        microbatches: number of microbatches that each replica's batch is cut into; their gradients accumulate.
            0: chosen by `for_batch`.
        schedule: order of the microbatches in the pipeline, one of SCHEDULES. `pipedream`: stages do not wait for the
            end of a step; each update uses the gradient at weights one step old (PipeDream-2BW; Narayanan et al.
            2021).
        stages: pipeline stages per worker; 0: two for `interleaved`, else one.
        recompute: activations that are not saved but recomputed in the backward pass. `none`: nothing is recomputed.
            `full`: all blocks. A fraction such as `1/2`: the first blocks of each stage, by their share (Chen et al.
            2016; method `block` of Megatron-LM). `selective`: in all blocks, the activations that are not results of
            PRODUCTS (Korthikanti et al. 2022).
        bucket: MiB of gradients in one all-reduce of the replicas, which overlaps the backward pass. Smaller buckets
            start earlier but need more messages (Li et al. 2020). 0: 25 MiB; torch DDP's first bucket is then 1 MiB.
        offload: 1 keeps the state that `fsdp` shards in host memory, where the optimizer runs. Each block is copied to
            the device when it computes (Ren et al. 2021, ZeRO-Offload). Slow: for models that fit in no other way.
        precision: precision of the computation, see `workload.precision`; empty: the workload's own. Parameters and
            optimizer stay float32.
        reduce: dtype in which replicas send and sum gradients: `bf16`, half of the bytes; empty: that of the gradients,
            float32. Each replica adds up its microbatches in float32 all the same.
        shares: shares of the batch, one number per replica in the order of ranks, such as `3:1`; empty: equal shares.
            For replicas on devices of different speed.
        speeds: relative speeds of the workers of a pipeline, one number each, such as `3:1`; empty: equal speeds.
            The model is cut so that all stages take equally long.
        compile: 1 runs what is between communication through torch's compiler, block by block: elementwise operations
            become few kernels, and less is saved for the backward pass (Ansel et al. 2024). It takes seconds to minutes
            before the first step.
        loss_pieces: number of pieces of the tokens in which the output layer and its cross entropy are computed, with
            their gradients, so that the logits of one piece exist at a time (Hsu et al. 2024). 0: whole.
        states: bits of an element of the optimizer states between steps: 8, as codes with a scale for each block, which
            is lossy (Dettmers et al. 2022). 0: as the optimizer has them.
        compress: compression of the gradients that replicas send each other, with error feedback: `powersgd:RANK`
            (Vogels et al. 2019), `topk:SHARE` of the elements (Lin et al. 2018), 8 bits (`int8`, `fp8`), 16 (`bf16`) or
            one (`sign`; Karimireddy et al. 2019) of each element, summed in float32. It is lossy. Of `dp` and `fsdp` in
            one strategy, what crosses `dp` is compressed.
        plain_steps: number of first steps that do not compress.
        local: steps that each replica along `dp` takes by itself before the replicas average their parameters (local
            SGD; Stich 2019); `fsdp`, `tp` and `pp` inside one such replica stay synchronous. 0: replicas sum gradients.
        outer: step that follows an average of `local` replicas. `average`: they go on from it. `nesterov`: its
            difference from the last one is the gradient of an outer optimizer (DiLoCo; Douillard et al. 2023).
        fragments: parts of the parameters that `local` replicas average at different steps (Streaming DiLoCo;
            Douillard et al. 2025).
        delay: steps that go on while an average of `local` replicas is on its way.
        outermost: axis whose ranks are farthest apart: replicas (`dp`) or stages (`pp`). It decides whether gradients
            or the activations between stages cross the slow links between hosts.
        ps: number of parameter servers, beside the workers: processes that hold the parameters and run the optimizer
            (Li et al. 2014); each worker of `dp` sends them gradients and fetches parameters. 0: none.
        staleness: steps by which a worker of `ps` may be ahead of the slowest one (Ho et al. 2013). 0: none, so that
            the training is that of one process. `unbounded`: nobody waits.

    Raises:
        StrategyError: a degree is below one, a word is unknown, or an option is given without its axis.
    """

    dp: int = 1
    fsdp: int = 1
    zero: int = 3
    tp: int = 1
    sp: int = 0
    pp: int = 1
    microbatches: int = 0
    schedule: str = "1f1b"
    stages: int = 0
    recompute: Recompute = NONE
    bucket: int = 0
    offload: int = 0
    precision: str = ""
    reduce: str = ""
    shares: Ratio = EQUAL
    speeds: Ratio = EQUAL
    outermost: str = "dp"
    compile: int = 0
    loss_pieces: int = 0
    states: int = 0
    compress: Compression = UNCOMPRESSED
    plain_steps: int = 0
    local: int = 0
    outer: str = "average"
    fragments: int = 1
    delay: int = 0
    ps: int = 0
    staleness: Staleness = SYNCHRONOUS

    def __post_init__(self) -> None:
        self._check_kinds()
        for axis in ("dp", "fsdp", "tp", "pp"):
            if getattr(self, axis) < 1:
                raise StrategyError(f"{axis}={getattr(self, axis)}: a degree is 1 or more")
        if self.microbatches < 0:
            raise StrategyError(f"microbatches={self.microbatches}: must be 1 or more")
        if self.loss_pieces < 0 or self.loss_pieces == 1:
            raise StrategyError(f"loss_pieces={self.loss_pieces}: must be 2 or more; 0 computes the loss whole")
        if self.states not in (0, 8):
            raise StrategyError(f"states={self.states}: must be 8, or 0 for states as the optimizer has them")
        if self.zero not in (1, 2, 3):
            raise StrategyError(f"zero={self.zero}: must be 1, 2 or 3")
        for switch in ("sp", "offload", "compile"):
            if getattr(self, switch) not in (0, 1):
                raise StrategyError(f"{switch}={getattr(self, switch)}: must be 0 or 1")
        for key, known in _CHOICES.items():
            value = getattr(self, key)
            if value not in known and not (key in _MAY_BE_EMPTY and value == ""):
                raise StrategyError(f"{key}={value}: known are {', '.join(known)}{nearest(value, known)}")
        if self.workers > MOST:
            raise StrategyError(f"the degrees make {self.workers} workers: at most {MOST} can be planned for")
        self._check_options()

    def _check_kinds(self) -> None:
        """Parse what is spelled, and check the type of each field and the size of numbers. Raises StrategyError."""
        whole = _WHOLE(self)
        if set(map(type, whole)) != {int} or max(whole) > MOST or min(whole) < -MOST:
            self._check_integers()
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise StrategyError(f"{name}={getattr(self, name)!r}: must be a text")
        for name, kind in _VALUES.items():
            value = getattr(self, name)
            if isinstance(value, kind):
                continue
            if kind is Staleness and type(value) is int:
                value = str(value)
            if not isinstance(value, str):
                raise StrategyError(f"{name}={value!r}: must be a text")
            object.__setattr__(self, name, kind.parse(name, value))

    def _check_integers(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise StrategyError(f"{name}={value!r}: must be a whole number")
            if not -MOST <= value <= MOST:
                raise StrategyError(f"{name}={_shown(value)}: must be {MOST} or less")

    def _check_options(self) -> None:
        """Check that each option comes with the axis that it belongs to. Raises StrategyError."""
        self._check_servers()
        self._check_gradients()
        self._check_local()
        if self.shares:
            self.shares.check("shares", self.replicas, "replicas")
        if self.speeds:
            self.speeds.check("speeds", self.pp, "pipeline workers")
        if self.outermost == "pp" and (self.pp == 1 or self.replicas == 1):
            raise StrategyError("outermost=pp needs pp=2 or more, and dp=2 or fsdp=2 or more beside it")
        if self.offload and not self.splits_parameters:
            raise StrategyError("offload=1 needs fsdp=2 or more with zero=2 or 3: it is for what these split")
        if self.sp and self.tp == 1:
            raise StrategyError("sp=1 needs tp=2 or more: it splits activations between the tensor shards")
        if self.zero != 3 and self.fsdp == 1:
            raise StrategyError(f"zero={self.zero} needs fsdp=2 or more: it says what fsdp splits")
        if self.schedule != "1f1b" and self.pp == 1:
            raise StrategyError(f"schedule={self.schedule} needs pp=2 or more: it orders a pipeline")
        if self.stages < 0 or (self.stages > 0 and self.pp == 1):
            raise StrategyError(f"stages={self.stages} needs pp=2 or more and stages=1 or more")
        if self.stages > 1 and self.schedule != "interleaved":
            raise StrategyError(f"stages={self.stages} needs schedule=interleaved, not {self.schedule}")
        if self.delayed and self.replicas > 1:
            raise StrategyError(
                f"schedule={PIPEDREAM} excludes dp={self.dp}, fsdp={self.fsdp}: replicas would wait for each other in "
                "every step, which its stages do not; use pp and tp alone, or schedule=1f1b"
            )

    def _check_servers(self) -> None:
        """Check that parameter servers come with what they can be combined with. Raises StrategyError."""
        if self.ps < 0:
            raise StrategyError(f"ps={self.ps}: must be 1 or more, or 0 for no parameter servers")
        if not self.ps:
            if self.staleness != SYNCHRONOUS:
                raise StrategyError(f"staleness={self.staleness} needs ps=1 or more: it is for parameter servers")
            return
        if self.dp == 1:
            raise StrategyError(f"ps={self.ps} needs dp=2 or more: workers that each hold the whole module")
        for option in _NOT_SERVED:
            if (value := getattr(self, option)) != _DEFAULTS[option]:
                raise StrategyError(
                    f"ps={self.ps} excludes {option}={value}: each worker runs the whole module, and the servers the "
                    f"optimizer; leave {option} out"
                )

    def _check_gradients(self) -> None:
        """Check the options that say how replicas sum gradients. Raises StrategyError."""
        if self.bucket < 0:
            raise StrategyError(f"bucket={self.bucket}: must be 1 MiB or more")
        if self.bucket and not self.sums_in_buckets:
            raise StrategyError(
                f"bucket={self.bucket} needs replicas that add up whole gradients: dp=2 or more, or fsdp with zero=1"
                + ("; those that take local steps add up none" if self.local else "")
            )
        if self.reduce and self.summing == 1:
            raise StrategyError(
                "reduce=bf16 needs dp=2 or fsdp=2 or more: replicas sum their gradients in bfloat16"
                + ("; those that take local steps sum none" if self.local else "")
            )
        self._check_compression()
        if self.precision:
            self._check_reduction(self.precision)

    def _check_compression(self) -> None:
        """Check how replicas compress gradients. Raises StrategyError."""
        if self.plain_steps < 0 or (self.plain_steps and not self.compress):
            raise StrategyError(f"plain_steps={self.plain_steps} needs compress=...: it says how many steps do not")
        if not self.compress:
            return
        what = f"compress={self.compress}"
        if self.replicas == 1:
            raise StrategyError(
                f"{what} needs dp=2 or fsdp=2 or more: it is for gradients that replicas send each other"
            )
        if self.local:
            raise StrategyError(f"{what} excludes local={self.local}: replicas that take local steps send no gradients")
        if self.reduce:
            raise StrategyError(f"{what} excludes reduce={self.reduce}: both say how gradients are sent")
        if self.offload and self.dp == 1:
            raise StrategyError(f"{what} excludes offload=1: each worker would hold the errors of all gradients")

    def _check_local(self) -> None:
        """Check the options that say how replicas take local steps. Raises StrategyError."""
        for name, least in (("local", 0), ("fragments", 1), ("delay", 0)):
            if getattr(self, name) < least:
                raise StrategyError(f"{name}={getattr(self, name)}: must be {max(least, 1)} or more")
        if not self.local:
            given = [name for name in ("outer", "fragments", "delay") if getattr(self, name) != _DEFAULTS[name]]
            if given:
                raise StrategyError(
                    f"{given[0]}={getattr(self, given[0])} needs local=1 or more: it is for local steps"
                )
            return
        if self.dp == 1:
            raise StrategyError(f"local={self.local} needs dp=2 or more: replicas along dp take local steps")
        if self.local % self.fragments:
            raise StrategyError(
                f"fragments={self.fragments} must divide local={self.local}: use fragments={_divisors(self.local)}"
            )
        if self.delay >= self.local:
            raise StrategyError(
                f"delay={self.delay} needs local={self.delay + 1} or more: an average must be there before the next "
                "one of the same parameters begins"
            )

    def _check_reduction(self, precision: str) -> None:
        if self.reduce and precision != BF16:
            raise StrategyError(
                f"reduce=bf16 needs precision=bf16, not {precision}: gradients of products in bfloat16 lose little"
            )

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Parse `single` or `axis=degree,...,option=word`. Raises StrategyError, which names the nearest known word."""
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        parts = [part.strip(" ") for part in text.split(",") if part.strip(" ")]
        if not parts:
            raise StrategyError(f"strategy {text!r} is empty; for example: single, dp=2, tp=2,pp=2")
        for part in parts:
            if part == "single":
                continue
            key, equals, value = (piece.strip(" ") for piece in part.partition("="))
            if key not in known:
                raise StrategyError(
                    f"unknown axis {key!r} in strategy {text!r}: known are single, {', '.join(known)}"
                    + nearest(key, [*known, "single"])
                )
            if not equals or not value:
                raise StrategyError(f"{part!r} in strategy {text!r} has no value; write {key}=...")
            if key in values:
                raise StrategyError(f"{key} is given twice in strategy {text!r}")
            values[key] = _integer(key, value) if key in _INTEGERS else value
        strategy = cls(**values)
        if "single" in parts and strategy.workers > 1:
            raise StrategyError(f"strategy {text!r}: single is one worker, the degrees make {strategy.workers}")
        return strategy

    @property
    def workers(self) -> int:
        """Return the number of worker processes: the product of the degrees."""
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def stale(self) -> bool:
        """Return whether workers may compute with parameters that are not the newest (`staleness` above 0)."""
        return self.staleness != SYNCHRONOUS

    @property
    def delayed(self) -> bool:
        """Return whether each update uses the gradient of the step before it, at weights one step old (`pipedream`)."""
        return self.schedule == PIPEDREAM

    @property
    def replicas(self) -> int:
        """Return the number of replicas, which share the batch: dp times fsdp."""
        return self.dp * self.fsdp

    @property
    def summing(self) -> int:
        """Return the number of replicas that sum gradients in every step: with `local` those of one `dp` replica."""
        return self.fsdp if self.local else self.replicas

    @property
    def changes(self) -> tuple[str, ...]:
        """Return what a strategy changes in a training beside rounding, as `--allow` names it: some of CHANGES.

        With `local=1` and plain averages updates are those of data parallelism for optimizers that are linear in the
        gradient (SGD, also with momentum, without clipping); with any other optimizer they are not.
        """
        return tuple(
            word
            for word, changed in zip(CHANGES, (self.local or self.compress, self.stale or self.delayed), strict=True)
            if changed
        )

    def of_replica(self, row: int) -> Strategy:
        """Return the strategy of the workers with index `row` along dp, which take local steps together."""
        columns = self.shares[row * self.fsdp : (row + 1) * self.fsdp] if self.fsdp > 1 else ()
        return self.with_(
            dp=1,
            shares=Ratio(columns),
            outermost=self.outermost if self.fsdp > 1 else "dp",
            **{name: _DEFAULTS[name] for name in ("local", "outer", "fragments", "delay")},
        )

    def batch_of(self, row: int, batch_size: int) -> int:
        """Return the samples of a global batch that fall to the workers with index `row` along dp."""
        return batch_size * sum(self.parts[row * self.fsdp : (row + 1) * self.fsdp]) // sum(self.parts)

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the names of the axes, outermost first: the last one varies fastest over the ranks."""
        return ("pp", "dp", "fsdp", "tp") if self.outermost == "pp" else ("dp", "fsdp", "pp", "tp")

    def stride(self, axis: str) -> int:
        """Return the difference between the ranks of two neighbours along an axis."""
        if axis == "tp":
            return 1
        stages_first = self.outermost == "pp"
        if axis == "pp":
            return self.tp * self.replicas if stages_first else self.tp
        inner = self.tp if stages_first else self.tp * self.pp
        return inner if axis == "fsdp" else inner * self.fsdp

    def rank(self, *, dp: int = 0, fsdp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """Return the rank of the worker with these coordinates on the axes."""
        return dp * self.stride("dp") + fsdp * self.stride("fsdp") + pp * self.stride("pp") + tp

    @property
    def parts(self) -> tuple[int, ...]:
        """Return each replica's share of the batch in the smallest whole numbers; the batch is cut into their sum."""
        if not self.shares:
            return (1,) * self.replicas
        common = gcd(*self.shares)
        return tuple(number // common for number in self.shares)

    @property
    def stage_speeds(self) -> tuple[int, ...]:
        """Return the relative speed of each stage's worker, by stage index; empty if all are equal."""
        return tuple(self.speeds) * self.stages_per_worker

    def samples_of(self, replica: int, batch_size: int) -> int:
        """Return the samples in one microbatch of a replica; needs `microbatches` above 0 (see `for_batch`)."""
        return batch_size // self.microbatches // sum(self.parts) * self.parts[replica]

    @property
    def kind(self) -> tuple[bool, ...]:
        """Return which of dp, fsdp, tp and pp have a degree above 1, in this order."""
        return self.dp > 1, self.fsdp > 1, self.tp > 1, self.pp > 1

    @property
    def runs_module(self) -> bool:
        """Return whether each worker runs the module as it is: no tp, no pp, not compiled, and its loss not in pieces.

        Any other strategy runs the traced graph of the module (`parallel.graph`).
        """
        return self.tp == self.pp == 1 and not self.compile and not self.loss_pieces

    @property
    def kernel_options(self) -> tuple[bool, str, int, bool]:
        """Return what decides which kernels run, beside sizes and precision.

        It is whether gradients of weights have passes of their own (zero-bubble), what is compiled, in how many pieces
        the loss is computed, and `gathers_again`.
        """
        return self.schedule == "zero-bubble", self.compiled, self.loss_pieces, self.gathers_again

    @property
    def gathers_again(self) -> bool:
        """Return whether the backward pass gathers inputs of layers again that `sp=1` gathered, instead of saving them.

        Blocks that are recomputed gather them anyway and save none. So it is not worth its time where all of them are.
        """
        return bool(self.sp) and self.schedule != "zero-bubble" and self.recompute not in (FULL, SELECTIVE)

    @property
    def compiled(self) -> str:
        """Return what is compiled: `all`, `rest` (all but products, whose results are saved), or nothing (empty)."""
        if not self.compile:
            return ""
        return "rest" if self.saves_products else "all"

    @property
    def splits_parameters(self) -> bool:
        """Return whether replicas hold slices of the parameters and all-gather them (`fsdp` with zero=2 or 3)."""
        return self.fsdp > 1 and self.zero > 1

    @property
    def reduces_at_once(self) -> bool:
        """Return whether replicas that split parameters do so again after the backward pass of each microbatch.

        In a pipeline gradients stay whole, and parameters gathered, until the last backward pass of a stage: its passes
        wait for each other, and for no collective between them.
        """
        return self.splits_parameters and self.pp == 1

    @property
    def sums_in_buckets(self) -> bool:
        """Return whether replicas all-reduce whole gradients in buckets.

        Replicas that hold slices of the parameters reduce-scatter the gradients instead (`fully_shard`).
        """
        return self.summing > 1 and not self.splits_parameters and not self.ps

    def precision_of(self, precision: str) -> str:
        """Return the precision in which a workload of `precision` computes; the strategy's own overrides it.

        Raises:
            StrategyError: the strategy reduces gradients in bfloat16, and the workload computes otherwise.
        """
        self._check_reduction(self.precision or precision)
        return self.precision or precision

    def in_bf16(self, precision: str) -> bool:
        """Return whether products of a workload of `precision` compute in bfloat16; see `precision_of`."""
        return dtype_of(self.precision_of(precision)) == BF16

    @property
    def recomputes(self) -> bool:
        """Return whether any block is recomputed in the backward pass."""
        return self.recompute != NONE

    @property
    def saves_products(self) -> bool:
        """Return whether recomputed blocks still save the results of PRODUCTS (`recompute=selective`)."""
        return self.recompute.keeps_products

    def recomputed_of(self, blocks: int) -> int:
        """Return the number of blocks to recompute out of `blocks`; they are the first ones.

        The backward pass reaches the first blocks last. By then the activations saved by the other blocks are free, so
        the memory of a recomputed block never adds to theirs.
        """
        return self.recompute.count_of(blocks)

    @property
    def stages_per_worker(self) -> int:
        """Return the number of pipeline stages per worker: more than one only for the schedule `interleaved`."""
        return self.stages or (2 if self.schedule == "interleaved" else 1)

    def with_(self, **changes: Any) -> Strategy:
        """Return a copy with some fields changed; the copy is checked like a new strategy."""
        return replace(self, **changes)

    def check_workers(self, workers: int) -> None:
        """Check that the degrees multiply to `workers`. Raises StrategyError."""
        if self.workers != workers:
            raise StrategyError(
                f"strategy {self} needs {self.workers} workers, there are {workers}: "
                f"use --workers {self.workers}, or degrees whose product is {workers}"
            )

    def for_batch(self, batch_size: int) -> Strategy:
        """Return the strategy with its number of microbatches settled for a global batch of `batch_size` samples.

        If `microbatches` is 0, a pipeline gets the largest number that is at most twice its stages and divides the
        batch of one replica. With `shares`, one part of the batch takes the place of the batch of one replica.

        Raises:
            StrategyError: the batch does not divide by replicas times microbatches, or `interleaved` cannot use the
                number of microbatches.
        """
        pieces = sum(self.parts)
        if batch_size % pieces:
            what = f"{pieces} parts" if self.shares else f"{pieces} replicas"
            raise StrategyError(
                f"batch_size={batch_size} does not divide by the {what} of {self}: use {_multiples(batch_size, pieces)}"
            )
        share = batch_size // pieces
        count = self.microbatches
        if count == 0:
            wanted = 1 if self.pp == 1 else 2 * self.pp * self.stages_per_worker
            count = max(number for number in range(1, wanted + 1) if share % number == 0)
        if share % count:
            unit = count * pieces
            raise StrategyError(
                f"batch_size={batch_size} does not divide into {count} microbatches on {self.replicas} replicas: "
                f"use {_multiples(batch_size, unit)}, or microbatches={_divisors(share)}"
            )
        if self.schedule == "interleaved" and count % self.pp:
            fitting = [n for n in _divisors_of(share) if n % self.pp == 0]
            hint = f"use microbatches={' or '.join(map(str, fitting[:4]))}" if fitting else "use another batch_size"
            raise StrategyError(
                f"schedule=interleaved needs microbatches that divide by pp={self.pp}, not {count}: {hint}"
            )
        if self.delayed and count < self.pp:
            raise StrategyError(
                f"schedule={PIPEDREAM} needs microbatches={self.pp} or more, as many as stages, not {count}: "
                f"use {_multiples(batch_size, self.pp * pieces)}"
                if share < self.pp
                else f"schedule={PIPEDREAM} needs as many microbatches as stages, {self.pp} or more, not {count}"
            )
        return self if count == self.microbatches else self.with_(microbatches=count)

    def __str__(self) -> str:
        default = Strategy()
        shown = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        if self.workers == 1:
            shown.insert(0, "single")
        return ",".join(shown)


_NOT_SERVED = (
    *("fsdp", "tp", "pp", "zero", "sp", "bucket", "reduce", "offload", "compile", "loss_pieces", "states"),
    *("compress", "local"),
)
"""Fields that exclude parameter servers, unless they have their default."""

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Strategy)}


def _integer(key: str, value: str) -> int:
    try:
        return parse_whole(value)
    except ValueError:
        raise StrategyError(f"{key}={value}: must be a whole number of at most {MOST}, in digits 0 to 9") from None


def _shown(value: int) -> str:
    """Format a whole number for a message; Python refuses to convert numbers of more than 4,300 digits."""
    return str(value) if abs(value) < 10**30 else f"a number of {value.bit_length()} bits"


def _multiples(batch_size: int, unit: int) -> str:
    below = batch_size // unit * unit
    return f"batch_size={below} or {below + unit}" if below else f"batch_size={unit}"


def _divisors(number: int) -> str:
    """Format the divisors of a number for a message; at most SUGGESTED of them, the smallest."""
    found = _divisors_of(number)
    return " or ".join(map(str, found[:SUGGESTED])) + (" ..." if len(found) > SUGGESTED else "")


def _divisors_of(number: int) -> list[int]:
    """Return all divisors of a number in ascending order, in time proportional to its square root."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
