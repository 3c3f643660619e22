"""Abilities of training software that others wrote: the strategies that it can run, as one table with sources.

    software = Software(ABILITIES["megatron"], sizes)
    software.refusal(Strategy.parse("fsdp=8"))      "fsdp=8: Megatron-LM has zero=1, not zero=3"

Shardwise's own program has no entry: it runs every strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardwise.errors import RequestError, nearest
from shardwise.predict.runtime import known
from shardwise.predict.runtime.runtime import SHARDWISE, Runtime
from shardwise.predict.runtime.sizes import Sizes
from shardwise.strategy import Strategy

EVERYWHERE = {
    **dict.fromkeys(("bucket", "compile", "loss_pieces", "states", "plain_steps", "local", "ps", "staleness"), ("0",)),
    **dict.fromkeys(("reduce", "shares", "speeds", "compress"), ("",)),
}
"""Options of Shardwise alone: how and when gradients are sent, and to whom; states in 8 bits, unequal parts."""

_UNSET = {"reduce": "float32", "compress": "none"}

MODULE = {**EVERYWHERE, "tp": ("1",), "sp": ("0",), "pp": ("1",), "recompute": ("none", "full")}
"""Options of software that wraps a module of the user's own, which it can neither cut nor shard by layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """Strategies that software can run.

    Attributes:
        name: name in `--runtime`.
        title: name in texts.
        runtime: its behaviour, for predictions.
        source: where its abilities were read.
        models: families of transformers that it has models of; empty: it runs the user's own module.
        values: option -> values that it may have; options that are not named may have any value.
        partly: whether it can recompute a part of the blocks (the first ones of each stage).
        zero: values of `zero` that it has.
        replicated: whether replicas may hold everything: `yes`, `alone` (without tp and pp), or `no`.
        hybrid: whether `dp` and `fsdp` may both be above 1.
        sequence: values of `sp` with tp.
        orders: values of `outermost` that it has where that matters, the usual one first.
        even: whether the number of blocks must divide by the number of stages, at least with the two ends counted as
            blocks.
        tied: whether embedding and output may share their matrix.
        plain: whether biases, learned positions and MLPs without gates are possible.
    """

    name: str
    title: str
    runtime: Runtime
    source: str
    models: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partly: bool = False
    zero: tuple[int, ...] = (1, 2, 3)
    replicated: str = "yes"
    hybrid: bool = False
    sequence: tuple[int, ...] = (0, 1)
    orders: tuple[str, ...] = ("dp", "pp")
    even: bool = False
    tied: bool = True
    plain: bool = True


MEGATRON = Abilities(
    name="megatron",
    title="Megatron-LM",
    runtime=known.MEGATRON_CORE,
    source="NVIDIA/Megatron-LM megatron/training/arguments.py, validate_args; its own fully sharded data parallelism "
    "(--use-megatron-fsdp) is left out: no published run of it has been predicted",
    models=("llama", "mistral", "qwen2", "gpt2"),
    values={**EVERYWHERE, "schedule": ("1f1b", "interleaved"), "recompute": ("none", "full"), "offload": ("0",)},
    partly=True,
    zero=(1,),
    orders=("pp", "dp"),
    even=True,
)

TORCHTITAN = Abilities(
    name="torchtitan",
    title="torchtitan",
    runtime=known.TORCHTITAN,
    source="pytorch/torchtitan torchtitan/models/llama3/infra/parallelize.py and pipeline.py: tensor parallelism "
    "always with sequence parallelism, DDP only alone, pipeline stages outermost; its zero-bubble schedules have two "
    "stages for each worker and are another schedule than Shardwise's",
    models=("llama", "mistral"),
    values={**EVERYWHERE, "schedule": ("1f1b", "gpipe", "interleaved"), "recompute": ("none", "full")},
    zero=(2, 3),
    replicated="alone",
    hybrid=True,
    sequence=(1,),
    orders=("pp",),
    tied=False,
    plain=False,
)

DEEPSPEED = Abilities(
    name="deepspeed",
    title="DeepSpeed",
    runtime=known.DEEPSPEED,
    source="deepspeedai/DeepSpeed docs/_pages/config-json.md; its pipelines need a PipelineModule, its tensor "
    "parallelism a model that it knows",
    values=MODULE,
    replicated="no",
)

ACCELERATE = Abilities(
    name="accelerate",
    title="accelerate",
    runtime=known.ACCELERATE,
    source="huggingface/accelerate examples/torch_native_parallelism/configs/tp_hsdp.yaml; its tensor parallelism "
    "needs a model with a plan of its own",
    values=MODULE,
    zero=(2, 3),
    hybrid=True,
)

ABILITIES: Mapping[str, Abilities] = {each.name: each for each in (MEGATRON, TORCHTITAN, DEEPSPEED, ACCELERATE)}
"""Software by name."""

RUNTIMES = (SHARDWISE.name, *ABILITIES)
"""Names that `--runtime` knows."""


def abilities_of(name: str) -> Abilities | None:
    """Return the abilities of software. Returns None for Shardwise, which runs every strategy.

    Raises:
        RequestError: no software has this name.
    """
    if name not in RUNTIMES:
        raise RequestError(f"runtime={name}: known are {', '.join(RUNTIMES)}{nearest(name, RUNTIMES)}")
    return ABILITIES.get(name)


@dataclass(frozen=True, slots=True)
class Software:
    """Software with the model that it trains.

    Attributes:
        abilities: strategies that it can run.
        sizes: sizes of its own model. None if it runs the user's module.
    """

    abilities: Abilities
    sizes: Sizes | None = None

    def allows(self, option: str, value: object) -> bool:
        """Return whether an option may have a value, regardless of the strategy's other options."""
        known_values = self.abilities.values.get(option)
        return known_values is None or str(value) in known_values or self._is_part(option, value)

    def _is_part(self, option: str, value: object) -> bool:
        return option == "recompute" and self.abilities.partly and "/" in str(value)

    def refusal(self, strategy: Strategy) -> str | None:
        """Return the reason why it cannot run a strategy. Returns None if it can."""
        reason = next(self._computing(strategy), None) or next(self._sharing(strategy), None)
        return reason and f"{strategy}: {reason}"

    def family_refusal(self, family: Strategy) -> str | None:
        """Return the reason why it can run no member of a family of strategies. Returns None if there is none."""
        return next(self._computing(family), None)

    def option_refusal(self, option: str, value: str) -> str | None:
        """Return the reason why no strategy that it can run has a value. Returns None if some may."""
        able = self.abilities
        if option == "zero" and int(value) not in able.zero:
            return self._zero(value)
        if option == "outermost" and value not in able.orders:
            return f"{able.title} places stages outermost: leave it out"
        return None if self.allows(option, value) else self._lacks(option, value)

    def _zero(self, value: object) -> str:
        has = " or ".join(f"zero={each}" for each in self.abilities.zero)
        return f"{self.abilities.title} has {has}, not zero={value}"

    def degree_refusal(self, tp: int) -> str | None:
        """Return the reason why it cannot shard layers by a degree. Returns None if it can."""
        return next(self._dividing(tp), None) if self.allows("tp", tp) else self._lacks("tp", tp)

    def _lacks(self, option: str, value: object) -> str:
        has = " or ".join(f"{option}={each or _UNSET.get(option, 'equal')}" for each in self.abilities.values[option])
        parts = ", and parts of the blocks" if option == "recompute" and self.abilities.partly else ""
        return f"{self.abilities.title} has {has}{parts}, not {option}={value}"

    def _computing(self, strategy: Strategy) -> Iterator[str]:
        """Yield the reasons against what each worker computes: everything but how replicas share parameters."""
        able = self.abilities
        for option in able.values:
            value = getattr(strategy, option)
            if not self.allows(option, value):
                yield self._lacks(option, value)
        if strategy.tp > 1 and strategy.sp not in able.sequence:
            yield f"{able.title} splits activations along the sequence wherever it has tp: add sp=1"
        yield from self._dividing(strategy.tp)
        stages = strategy.pp * strategy.stages_per_worker
        if self.sizes is not None and able.even and self.sizes.layers % stages and (self.sizes.layers + 2) % stages:
            yield (
                f"{able.title} needs stages of equally many blocks: {self.sizes.layers} do not divide by {stages}, nor "
                f"do {self.sizes.layers + 2} with embedding and output"
            )
        if self.sizes is not None and self.sizes.layers < stages:
            yield f"{self.sizes.layers} blocks are too few for {stages} stages"

    def _dividing(self, tp: int) -> Iterator[str]:
        """Yield the sizes that a degree of tensor parallelism does not divide."""
        if self.sizes is None:
            return
        for what, size in (
            ("attention heads", self.sizes.heads),
            ("heads of keys and values", self.sizes.kv_heads),
            ("columns of the MLP", self.sizes.ffn),
            ("tokens of a sequence", self.sizes.sequence),
        ):
            if size % tp:
                yield f"tp={tp} does not divide the {size} {what} of {self.abilities.title}'s model"

    def _sharing(self, strategy: Strategy) -> Iterator[str]:
        """Yield the reasons against how replicas share parameters, and against the order of the axes."""
        able, dp, fsdp = self.abilities, strategy.dp, strategy.fsdp
        zero = " or ".join(f"zero={each}" for each in able.zero)
        if fsdp > 1 and strategy.zero not in able.zero:
            yield self._zero(strategy.zero)
        if dp > 1 and fsdp > 1 and not able.hybrid:
            yield f"{able.title} has no replicas of shards: use fsdp={dp * fsdp} alone"
        if dp > 1 and fsdp == 1 and able.replicated == "no":
            yield f"{able.title} shards the optimizer at least: use fsdp={dp} with {zero} in place of dp={dp}"
        if dp > 1 and fsdp == 1 and able.replicated == "alone" and not strategy.runs_module:
            yield f"{able.title} has replicas without tp and pp alone: use fsdp={dp} in place of dp={dp}"
        if strategy.pp > 1 and strategy.replicas > 1 and strategy.outermost not in able.orders:
            yield f"{able.title} places stages outermost: add outermost={able.orders[0]}"
