"""How a training step is split over workers: the value at the centre of everything.

    >>> Strategy.parse("dp=2,tp=2").workers
    4
    >>> str(Strategy.parse("tp=2, pp=2, microbatches=8, schedule=1f1b"))
    'tp=2,pp=2,microbatches=8'

Axes, outermost first: `dp` (replicas), `fsdp` (replicas that share parameters), `pp` (stages), `tp` (layer shards).
Ranks are numbered with `tp` fastest, because its messages are the most frequent; with `outermost=pp` stages come first,
so that they lie on different hosts, and replicas of a stage beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil, gcd, isqrt
from typing import Any

from shardwise.errors import StrategyError, nearest
from shardwise.units import parse_whole

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
RECOMPUTE = ("none", "selective", "full")
PRODUCTS = frozenset(
    {
        "aten.mm",
        "aten.addmm",
        "aten.convolution",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
    }
)
"""Operations whose results `recompute=selective` keeps: products with weights, convolutions and fused attention. A
product of two activations (`bmm`) is attention that is spelled out, whose results are large."""
PRECISIONS = ("float32", "bf16")
OUTERMOST = ("dp", "pp")
SUGGESTED = 16
"""Values that a message names at most."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "outermost": OUTERMOST,
}
MOST = 1_000_000
"""Workers of a strategy, and the largest value of any of its numbers: more is a slip of the hand."""

_INTEGERS = ("dp", "fsdp", "zero", "tp", "sp", "pp", "microbatches", "stages", "bucket", "offload")
_TEXTS = ("schedule", "recompute", "precision", "shares", "speeds", "outermost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """An immutable way to split a training step; cannot exist when it is wrong in itself.

    Attributes:
        dp: replicas of the model, each with its share of the batch (torch DDP).
        fsdp: replicas that also split the parameters between them (ZeRO; Rajbhandari et al. 2020).
        zero: what `fsdp` splits: 1 optimizer state, 2 also gradients, 3 also parameters.
        tp: shards of each layer (Megatron-LM; Shoeybi et al. 2019).
        sp: activations between sharded layers are split along the sequence (Korthikanti et al. 2022); needs `tp`.
        pp: pipeline stages, each with its share of the layers.
        microbatches: pieces that each replica's batch is cut into; gradients accumulate over them. 0: chosen.
        schedule: order of the microbatches in the pipeline.
        stages: pipeline stages per worker; 0: two for `interleaved`, else one.
        recompute: activations that are dropped and computed again in the backward pass: of no block (`none`), of all
            (`full`), of the first part of them on each stage, `1/2` say (Chen et al. 2016; in Megatron-LM: method
            `block`), or of all blocks those that are no results of products (`selective`; Korthikanti et al. 2022).
        bucket: MiB of gradients that replicas add up in one message while the backward pass goes on: the smaller, the
            sooner the first ones leave, and the more messages there are (Li et al. 2020). 0: 25, with torch DDP a first
            one of 1.
        offload: 1: what `fsdp` splits stays in the memory of the host, which runs the optimizer; each block comes to
            the device when it computes (Ren et al. 2021, ZeRO-Offload). Slow: for what fits in no other way.
        precision: dtype of the computation; empty: the workload's own. Parameters and optimizer stay float32.
        shares: of the batch, one number for each replica in the order of ranks, `3:1` say; empty: all alike. For
            replicas on devices of different speed.
        speeds: of the workers of a pipeline, one number for each, `3:1` say; empty: all alike. Stages are cut so that
            all take as long.
        outermost: whose ranks are farthest from each other: those of replicas (`dp`), or of stages (`pp`). Where links
            between hosts are slow, either gradients cross them or what stages hand to each other.

    Raises:
        StrategyError: a degree below one, an unknown word, an option without its axis.
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
    recompute: str = "none"
    bucket: int = 0
    offload: int = 0
    precision: str = ""
    shares: str = ""
    speeds: str = ""
    outermost: str = "dp"

    def __post_init__(self) -> None:
        self._check_kinds()
        for axis in ("dp", "fsdp", "tp", "pp"):
            if getattr(self, axis) < 1:
                raise StrategyError(f"{axis}={getattr(self, axis)}: a degree is 1 or more")
        if self.microbatches < 0:
            raise StrategyError(f"microbatches={self.microbatches}: must be 1 or more")
        if self.zero not in (1, 2, 3):
            raise StrategyError(f"zero={self.zero}: must be 1, 2 or 3")
        for switch in ("sp", "offload"):
            if getattr(self, switch) not in (0, 1):
                raise StrategyError(f"{switch}={getattr(self, switch)}: must be 0 or 1")
        for key, known in _CHOICES.items():
            value = getattr(self, key)
            if value not in known and not (key == "precision" and value == ""):
                raise StrategyError(f"{key}={value}: known are {', '.join(known)}{nearest(value, known)}")
        if self.workers > MOST:
            raise StrategyError(f"the degrees make {self.workers} workers: at most {MOST} can be planned for")
        share = _share_of_blocks(self.recompute)
        if 0 < share < 1:  # in lowest terms, so that equal strategies are equal values
            object.__setattr__(self, "recompute", str(share))
        self._check_options()

    def _check_kinds(self) -> None:
        """Raises StrategyError: a number that is none or out of all bounds, a word that is none."""
        for name in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise StrategyError(f"{name}={value!r}: must be a whole number")
            if not -MOST <= value <= MOST:
                raise StrategyError(f"{name}={_shown(value)}: must be {MOST} or less")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise StrategyError(f"{name}={getattr(self, name)!r}: must be a text")

    def _check_options(self) -> None:
        """An option without the axis that it belongs to is a mistake, not a wish."""
        if self.shares:
            _check_numbers("shares", self.shares, self.replicas, "replicas")
        if self.speeds:
            _check_numbers("speeds", self.speeds, self.pp, "pipeline workers")
        if self.outermost == "pp" and (self.pp == 1 or self.replicas == 1):
            raise StrategyError("outermost=pp needs pp=2 or more, and dp=2 or fsdp=2 or more beside it")
        if self.bucket < 0:
            raise StrategyError(f"bucket={self.bucket}: must be 1 MiB or more")
        if self.bucket and not self.sums_in_buckets:
            raise StrategyError(
                f"bucket={self.bucket} needs replicas that add up whole gradients: dp=2 or more, or fsdp with zero=1"
            )
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

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Reads `single` or `axis=degree,...,option=word`. Raises StrategyError naming the nearest known word."""
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
        """Number of worker processes: the product of the degrees."""
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def replicas(self) -> int:
        """Number of shares that a batch is cut into: dp times fsdp."""
        return self.dp * self.fsdp

    @property
    def axes(self) -> tuple[str, ...]:
        """Outermost first: the last one varies fastest over the ranks."""
        return ("pp", "dp", "fsdp", "tp") if self.outermost == "pp" else ("dp", "fsdp", "pp", "tp")

    def stride(self, axis: str) -> int:
        """From a rank to the next one along an axis."""
        if axis == "tp":
            return 1
        stages_first = self.outermost == "pp"
        if axis == "pp":
            return self.tp * self.replicas if stages_first else self.tp
        inner = self.tp if stages_first else self.tp * self.pp
        return inner if axis == "fsdp" else inner * self.fsdp

    def rank(self, *, dp: int = 0, fsdp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The number of the worker with these coordinates."""
        return dp * self.stride("dp") + fsdp * self.stride("fsdp") + pp * self.stride("pp") + tp

    @property
    def parts(self) -> tuple[int, ...]:
        """What each replica has of a batch, in the smallest whole numbers: the batch is cut into their sum."""
        if not self.shares:
            return (1,) * self.replicas
        numbers = [int(number) for number in self.shares.split(":")]
        return tuple(number // gcd(*numbers) for number in numbers)

    @property
    def stage_speeds(self) -> tuple[int, ...]:
        """How fast the worker of each stage is, compared with the others of its pipeline; empty: all are alike."""
        return tuple(map(int, self.speeds.split(":"))) * self.stages_per_worker if self.speeds else ()

    def samples_of(self, replica: int, batch_size: int) -> int:
        """Samples of a replica's microbatch (their number settled)."""
        return batch_size // self.microbatches // sum(self.parts) * self.parts[replica]

    @property
    def kind(self) -> tuple[bool, ...]:
        """Which of dp, fsdp, tp and pp there are."""
        return self.dp > 1, self.fsdp > 1, self.tp > 1, self.pp > 1

    @property
    def splits_parameters(self) -> bool:
        """Whether replicas keep slices of the parameters and gather them (`fsdp` with zero=2 or 3)."""
        return self.fsdp > 1 and self.zero > 1

    @property
    def sums_in_buckets(self) -> bool:
        """Whether replicas add up whole gradients in buckets; where they keep slices, `fully_shard` scatters them."""
        return self.replicas > 1 and not self.splits_parameters

    def in_bf16(self, precision: str) -> bool:
        """Whether a workload of `precision` computes in bfloat16 here: the strategy's own precision goes first."""
        return (self.precision or precision) == "bf16"

    @property
    def recomputes(self) -> bool:
        """Whether any block is computed again."""
        return self.recompute != "none"

    @property
    def keeps_products(self) -> bool:
        """Whether blocks that are computed again keep the results of their products."""
        return self.recompute == "selective"

    def recomputed_of(self, blocks: int) -> int:
        """How many of so many blocks are computed again: the first ones.

        What the others keep is free again before the backward pass comes to the first ones, so that a block that is
        computed again never comes on top of it.
        """
        return ceil(_share_of_blocks(self.recompute) * blocks)

    @property
    def stages_per_worker(self) -> int:
        """Pipeline stages that one worker holds: more than one where the schedule interleaves."""
        return self.stages or (2 if self.schedule == "interleaved" else 1)

    def with_(self, **changes: Any) -> Strategy:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def check_workers(self, workers: int) -> None:
        """Raises StrategyError where the degrees do not multiply to `workers`."""
        if self.workers != workers:
            raise StrategyError(
                f"strategy {self} needs {self.workers} workers, there are {workers}: "
                f"use --workers {self.workers}, or degrees whose product is {workers}"
            )

    def for_batch(self, batch_size: int) -> Strategy:
        """The strategy with the number of microbatches settled for a global batch of `batch_size` samples.

        A pipeline gets the largest number up to twice its stages that divides the batch of one replica. With `shares`
        what is called the batch of one replica here is that of one part of them.

        Raises:
            StrategyError: the batch does not divide by replicas times microbatches.
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
        return self.with_(microbatches=count)

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


def _check_numbers(option: str, text: str, count: int, what: str) -> None:
    numbers = text.split(":")
    if not all(_is_count(number) for number in numbers) or len(numbers) != count:
        example = ":".join(["2", *["1"] * (min(count, 8) - 1)]) + (":..." if count > 8 else "")
        raise StrategyError(
            f"{option}={text}: one whole number of 1 or more for each of the {count} {what}, "
            f"with colons between them: {option}={example}"
        )


def _share_of_blocks(recompute: str) -> Fraction:
    """The part of the blocks that is computed again."""
    if recompute in RECOMPUTE:
        return Fraction(recompute != "none")
    over, slash, under = recompute.partition("/")
    whole = bool(slash) and _is_count(over) and _is_count(under)
    if not whole or not 0 < int(over) < int(under):
        raise StrategyError(
            f"recompute={recompute}: known are {', '.join(RECOMPUTE)} and parts of the blocks, 1/2 or 3/4 say"
            + nearest(recompute, RECOMPUTE)
        )
    return Fraction(int(over), int(under))


def _integer(key: str, value: str) -> int:
    try:
        return parse_whole(value)
    except ValueError:
        raise StrategyError(f"{key}={value}: must be a whole number of at most {MOST}, in digits 0 to 9") from None


def _is_count(text: str) -> bool:
    """Return whether a text is a whole number from 1 on."""
    try:
        return 1 <= parse_whole(text) <= MOST
    except ValueError:
        return False


def _shown(value: int) -> str:
    """A number for a message, also one of more digits than Python writes."""
    return str(value) if abs(value) < 10**30 else f"a number of {value.bit_length()} bits"


def _multiples(batch_size: int, unit: int) -> str:
    below = batch_size // unit * unit
    return f"batch_size={below} or {below + unit}" if below else f"batch_size={unit}"


def _divisors(number: int) -> str:
    """The divisors of a number, for messages: all, or the smallest ones."""
    found = _divisors_of(number)
    return " or ".join(map(str, found[:SUGGESTED])) + (" ..." if len(found) > SUGGESTED else "")


def _divisors_of(number: int) -> list[int]:
    """All divisors, ascending, in as many steps as its square root."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
