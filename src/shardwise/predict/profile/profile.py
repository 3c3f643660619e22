"""Profile of one step of a workload on one device: kernels, exchanges, parameters and activations. Predictions read it.

A step is a chain of segments: the pieces of its graph between neighbouring cut points (see
`parallel.pipeline.cut_points`). A segment is a `Segment`, and segments are known by their index in the chain. Each has
a `Layer`: kernels, exchanges and bytes of one microbatch on one tensor-parallel worker. Equal segments share one layer
object, so that a model of a thousand equal blocks is as fast to predict as one of two.

    profile.segments[i].layer.forward     kernels and exchanges of the forward pass of segment i
    profile.parameters                 parameters and buffers, and the segments that use them
    profile.values                     tensors that segments hand to each other: messages of a pipeline, activations

`predict.profile.profiler` makes profiles from workloads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain

from shardwise.errors import StrategyError
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.memo import Memo
from shardwise.predict.runtime.runtime import SHARDWISE, Runtime
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One collective of a pass, by default among the tensor-parallel workers.

    Attributes:
        operation, bytes: as in `collective.Collective`.
        hidden: whether the worker computes meanwhile, at the loss of speed that overlap costs.
        ranks, stride: its group, if that is not the tensor-parallel workers (context parallelism); 0: it is.
        beside: kernels of the same pass that the worker computes before it waits for the result.
    """

    operation: str
    bytes: int
    hidden: bool = False
    ranks: int = 0
    stride: int = 1
    beside: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerPass:
    """Kernels and exchanges of one pass through a layer."""

    kernels: tuple[Kernel, ...] = ()
    exchanges: tuple[Exchanged, ...] = ()

    @property
    def rest(self) -> LayerPass:
        """Return the part of the pass that selective recomputation runs again: all kernels but `strategy.PRODUCTS`."""
        return replace(self, kernels=tuple(kernel for kernel in self.kernels if not kernel.product))


@dataclass(frozen=True, slots=True)
class Layer:
    """Kernels, exchanges and bytes of one microbatch in one segment on one worker.

    Attributes:
        forward: the forward pass.
        backward: the backward pass; if the profile is `split`, only for gradients of the inputs.
        weights: the pass for gradients of the weights, if the profile is `split` (zero-bubble); else empty.
        recomputed: the part of the forward pass that is recomputed if this is the last segment of a recomputed block:
            torch stops after the last tensor that the backward pass needs.
        saves: whether the backward pass needs any tensor of the forward pass.
        inside: bytes saved for the backward pass, without the values that segments hand to each other.
        products: bytes of the results that selective recomputation keeps (`parallel.operators.selective_checkpoint`).
        once: bytes saved that stay if the block is recomputed: what computed them is not computed again.
        temporary_forward: peak bytes of the forward pass beside what is saved.
        temporary_backward: peak bytes of the backward pass beside what is saved, including gradients of activations.
        normalised: number of channels of each batch norm in training mode.
    """

    forward: LayerPass = LayerPass()
    backward: LayerPass = LayerPass()
    weights: LayerPass = LayerPass()
    recomputed: LayerPass = LayerPass()
    saves: bool = True
    inside: int = 0
    products: int = 0
    once: int = 0
    temporary_forward: int = 0
    temporary_backward: int = 0
    normalised: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One parameter, or buffer, as one tensor-parallel worker holds it.

    Attributes:
        name: name in the plain module.
        shape: shape of the part that one worker holds.
        itemsize: bytes per element.
        segments: segments that use it, in ascending order.
        trained: whether it has a gradient.
        cut: whether tensor parallelism shards it.
        summed: whether each tensor-parallel worker computes a partial gradient, so that they must be summed over tp.
        buffer: whether it is a buffer.
        kept: whether it stays in float32 (`Workload.float32`) where others are computed with in bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    segments: tuple[int, ...]
    trained: bool = True
    cut: bool = False
    summed: bool = False
    buffer: bool = False
    kept: bool = False

    @property
    def whole(self) -> bool:
        """Return whether `fully_shard` leaves it whole: a scalar, which has no rows, or one that stays in float32."""
        return not self.shape or self.kept

    @cached_property
    def elements(self) -> int:
        """Count the elements that one worker holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @cached_property
    def bytes(self) -> int:
        """Return the bytes that one worker holds."""
        return self.elements * self.itemsize


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that one segment makes and others use.

    Attributes:
        message: bytes of the message that sends it from one stage to another.
        held: bytes of memory that it takes while it is alive; 0 if it is a view of another value.
        made: segment that makes it; -1 if it is computed from the batch alone, by each stage that needs it.
        used: segments that use it, in ascending order.
        saved: segments that save it for their backward pass, in ascending order.
        grad: whether it has a gradient, which is sent back.
    """

    message: int
    held: int
    made: int
    used: tuple[int, ...]
    saved: tuple[int, ...] = ()
    grad: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of the chain: a piece of the step's graph between two neighbouring cut points.

    Attributes:
        layer: its kernels, exchanges and bytes.
        message: bytes to send if the step is cut before this segment; 0 for the first one.
        constants: bytes of the module's tensors outside of its state dict that this segment is the first to use.
    """

    layer: Layer
    message: int = 0
    constants: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """Work and memory of the optimizer per element of a parameter.

    Attributes:
        kernels: kernels of an update, with `bytes` and `flops` per element.
        state_bytes: bytes of optimizer state per element.
        together: whether one kernel updates all parameters (`foreach`, `fused`) instead of one kernel for each.
        temporary_bytes: bytes of short-lived tensors per element if one kernel updates all parameters, as on a GPU.
        one_by_one: whether parameters are updated one at a time, with `temporary_bytes` of one at a time.
        eight_bit: the update with states in 8 bits; None if the optimizer cannot have them.
    """

    kernels: tuple[Kernel, ...] = ()
    state_bytes: float = 0.0
    together: bool = False
    temporary_bytes: float = 0.0
    one_by_one: bool = False
    eight_bit: Update | None = None

    def of(self, strategy: Strategy) -> Update:
        """Return the update with states as a strategy keeps them. Raises StrategyError if the optimizer cannot."""
        if not strategy.states:
            return self
        if self.eight_bit is None:
            raise StrategyError(
                "states=8 needs an optimizer of torch's own that updates each element from itself and has states, "
                "such as AdamW"
            )
        return self.eight_bit

    def at_once(self, device: str) -> bool:
        """Return whether one kernel updates all parameters on this kind of device, as torch does on any GPU."""
        return not self.one_by_one and (self.together or device == "gpu")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profile of one step of a workload on one device; see the module's docstring.

    Attributes:
        name: name of the workload.
        tp: degree of tensor parallelism that it is for.
        sp: whether activations are sharded along the sequence (sequence parallelism).
        microbatch: samples of a microbatch.
        precision: `float32` or `bf16`.
        device: kind of device that it is for, `gpu` or `cpu`: they run other kernels and save other tensors.
        batch_size: global batch size of the workload.
        segments: the chain of segments.
        parameters: parameters and buffers, in the order of the module.
        values: tensors that segments hand to each other.
        blocks: indices of the parameters of each repeated block of the module, in its order; see
            `parallel.data.blocks`.
        update: work of the optimizer per element.
        losses: number of losses that are averaged one by one, if it is more than 1.
        weighted: whether the workload weights its batches, so that replicas all-reduce the weight in each step.
        clipped: whether gradients are clipped.
        split: whether gradients of weights and of inputs are computed in passes of their own (zero-bubble).
        compiled: what is compiled, see `Strategy.compiled`.
        loss_pieces: number of pieces of the tokens in which the loss is computed; 0: whole.
        gathers_again: see `Strategy.gathers_again`; None if it is for strategies that do and that do not.
        cut: whether the step could be traced, so that tp and pp are possible.
        ready: indices of trained parameters in the order in which their gradients become complete.
        batch_bytes: bytes of the data of one microbatch.
        notes: remarks to show to users, one line each.
        runtime: the software that runs the step.
    """

    name: str
    tp: int
    sp: int
    microbatch: int
    precision: str
    device: str
    batch_size: int
    segments: tuple[Segment, ...]
    parameters: tuple[Parameter, ...]
    values: tuple[Value, ...]
    blocks: tuple[tuple[int, ...], ...] = ()
    update: Update = Update()
    weighted: bool = False
    losses: int = 1
    clipped: bool = False
    split: bool = False
    compiled: str = ""
    loss_pieces: int = 0
    gathers_again: bool | None = None
    cut: bool = True
    ready: tuple[int, ...] = ()
    batch_bytes: int = 0
    notes: tuple[str, ...] = ()
    runtime: Runtime = SHARDWISE
    memo: Memo = field(default_factory=Memo, repr=False, compare=False)
    """Memo table for values that are derived from this profile."""

    @cached_property
    def _itemsize(self) -> int:
        return max((self.parameters[index].itemsize for index in self.trained), default=1)

    @cached_property
    def reduced(self) -> float:
        """Return the bytes of a gradient when replicas reduce it, relative to those of its parameter."""
        return (self.runtime.gradient_bytes or self._itemsize) / self._itemsize

    @cached_property
    def scattered(self) -> float:
        """Return the bytes of a sharded gradient when it is reduced, relative to those of its parameter."""
        return self.runtime.scattered_bytes / self._itemsize if self.runtime.scattered_bytes else self.reduced

    @cached_property
    def half(self) -> float:
        """Return the bytes of a gradient in bfloat16, relative to those of its parameter."""
        return min(1.0, 2 / self._itemsize)

    @cached_property
    def gathered(self) -> float:
        """Return the bytes of a parameter when replicas gather it, relative to those that are stored."""
        return (self.runtime.gathered_bytes or self._itemsize) / self._itemsize

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """Prefix sums of the bytes saved for the backward pass: entry i is the sum over segments before i.

        A value that several segments save counts at the first of them.
        """
        own = [segment.layer.inside for segment in self.segments]
        for value in self.values:
            if value.saved:
                own[value.saved[0]] += value.held
        return tuple(accumulate(own, initial=0))

    @cached_property
    def products(self) -> tuple[int, ...]:
        """Prefix sums of the bytes that selective recomputation keeps: entry i is the sum over segments before i."""
        return tuple(accumulate((segment.layer.products for segment in self.segments), initial=0))

    @cached_property
    def once(self) -> tuple[int, ...]:
        """Prefix sums of the bytes that every recomputation keeps: entry i is the sum over segments before i."""
        return tuple(accumulate((segment.layer.once for segment in self.segments), initial=0))

    @cached_property
    def live(self) -> tuple[tuple[Value, ...], ...]:
        """List the live values before each segment and after the last one: made before that point and used after it."""
        found: list[list[Value]] = [[] for _ in range(len(self.segments) + 1)]
        for value in self.values:
            for segment in range(max(value.made + 1, 0), value.used[-1] + 1):
                found[segment].append(value)
        return tuple(map(tuple, found))

    def crossing(self, first: int, end: int) -> list[Value]:
        """Return the values that enter segments `first` to `end` from earlier ones, or leave them for later ones."""
        arriving = [value for value in self.live[first] if any(first <= segment < end for segment in value.used)]
        return arriving + [value for value in self.live[end] if value.made >= first]

    @cached_property
    def _users(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.segments]
        for index, parameter in enumerate(self.parameters):
            for segment in parameter.segments:
                found[segment].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def kinds_of_segments(self) -> tuple[int, ...]:
        """Number the kinds of segments: equal numbers mean equal layer, saved bytes and parameters, at any position."""
        own = [self.saved[segment + 1] - self.saved[segment] for segment in range(len(self.segments))]
        known: dict[object, int] = {}
        return tuple(
            known.setdefault((id(segment.layer), memo, self._used_by(number)), len(known))
            for number, (segment, memo) in enumerate(zip(self.segments, own, strict=True))
        )

    def _used_by(self, segment: int) -> tuple[object, ...]:
        """Return the parameters of a segment, as (kind, distances to the segments that use it) pairs."""
        used = ((self._kinds[index], self.parameters[index].segments) for index in self._users[segment])
        return tuple((kind, tuple(other - segment for other in segments)) for kind, segments in used)

    def within(self, first: int, end: int) -> tuple[int, ...]:
        """Return the indices of the parameters that segments `first` to `end` use, in ascending order."""
        users = self._users
        return self.memo.once(("within", first, end), lambda: tuple(sorted(set(chain.from_iterable(users[first:end])))))

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """Return the indices of the parameters that several segments use."""
        return tuple(index for index, parameter in enumerate(self.parameters) if len(parameter.segments) > 1)

    @cached_property
    def _kinds(self) -> tuple[int, ...]:
        """Map each parameter to the first one that differs from it in name and segments only, by index."""
        first: dict[object, int] = {}
        return tuple(
            first.setdefault((p.shape, p.itemsize, p.trained, p.cut, p.summed, p.buffer, p.kept), index)
            for index, p in enumerate(self.parameters)
        )

    def kinds_within(self, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[Parameter, int], ...]:
        """Group the parameters that ranges of segments use by kind: (one parameter of the kind, count), in order."""

        def count() -> tuple[tuple[Parameter, int], ...]:
            indices = {index for first, end in ranges for index in self.within(first, end)}
            counts = Counter(map(self._kinds.__getitem__, sorted(indices)))
            return tuple((self.parameters[kind], many) for kind, many in counts.items())

        return self.memo.once(("kinds within", ranges), count)

    @cached_property
    def largest(self) -> int:
        """Return the bytes of the largest trained parameter; 0 if none is trained."""
        return max((self.parameters[index].bytes for index in self.trained), default=0)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Return the indices of the trained parameters."""
        return tuple(index for index, parameter in enumerate(self.parameters) if parameter.trained)

    @cached_property
    def flops(self) -> float:
        """Return the FLOPs of one microbatch on one worker, forward and backward, without recomputation."""
        total = 0.0
        for segment in self.segments:
            layer = segment.layer
            for each in (layer.forward, layer.backward, layer.weights):
                total += sum(k.flops * k.count for k in each.kernels if k.when != "recompute")
        return total


def module_blocks(profile: Profile) -> list[tuple[int, int]]:
    """Return the segment range (first, end) of each repeated block, in the order of the module."""
    found = []
    for block in profile.blocks:
        segments = [segment for index in block for segment in profile.parameters[index].segments]
        found.append((min(segments), max(segments) + 1))
    return found
