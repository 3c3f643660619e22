"""What one step of a workload needs on one device: the value that predictions are computed from.

A step is a chain of links, the parts between neighbouring places where its graph can be cut (see `parallel.cuts`). Each
link has a layer: the kernels, exchanges and bytes of one microbatch on one worker of tensor parallelism. Equal links
share one layer, so that a model of a thousand equal blocks is as quick to predict as one of two.

    profile.links[i].layer.forward     kernels of the forward pass of link i
    profile.parameters                 what is trained, and which links use it
    profile.values                     what links hand to each other: messages of a pipeline, activations that are kept

`predict.profiling` makes them from workloads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain

from shardwise.predict.kept import Kept
from shardwise.predict.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One exchange among tensor-parallel workers: operation and bytes as in `collective.Collective`."""

    operation: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Kernels and exchanges of one pass through a layer."""

    kernels: tuple[Kernel, ...] = ()
    exchanges: tuple[Exchanged, ...] = ()

    @property
    def rest(self) -> Pass:
        """Without products: what is computed again where their results are kept."""
        return replace(self, kernels=tuple(kernel for kernel in self.kernels if not kernel.product))


@dataclass(frozen=True, slots=True)
class Layer:
    """What one microbatch needs of one link on one worker.

    Attributes:
        forward: the forward pass.
        backward: the backward pass; of the inputs only, where the profile is `split`.
        weights: gradients of the weights, where the profile is `split` (zero-bubble); else empty.
        recomputed: what is computed again where this is the last link of a block that is recomputed: torch stops after
            the last tensor that the backward pass needs.
        keeps: whether the backward pass needs any tensor of the forward pass.
        inside: bytes that are kept for the backward pass, without the values that links hand to each other.
        products: bytes of the results of products, which stay where the rest is computed again (`parallel.selective`).
        temporary_forward: most bytes at a time beside what is kept, in the forward pass.
        temporary_backward: the same in the backward pass, gradients of activations included.
        normalised: channels of each batch norm in training.
    """

    forward: Pass = Pass()
    backward: Pass = Pass()
    weights: Pass = Pass()
    recomputed: Pass = Pass()
    keeps: bool = True
    inside: int = 0
    products: int = 0
    temporary_forward: int = 0
    temporary_backward: int = 0
    normalised: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One parameter, or buffer, as one tensor-parallel worker holds it.

    Attributes:
        name: in the plain module.
        shape: of what one worker holds.
        itemsize: bytes of an element.
        links: that use it, ascending.
        trained: whether it has a gradient.
        cut: whether tensor parallelism cuts it.
        summed: whether its gradients are summands of the tensor-parallel workers.
        buffer: whether it is a buffer.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    links: tuple[int, ...]
    trained: bool = True
    cut: bool = False
    summed: bool = False
    buffer: bool = False

    @cached_property
    def elements(self) -> int:
        """Of what one worker holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @cached_property
    def bytes(self) -> int:
        """Of what one worker holds."""
        return self.elements * self.itemsize


@dataclass(frozen=True, slots=True)
class Value:
    """What one link makes and others use.

    Attributes:
        message: bytes when it is sent from one stage to another.
        held: bytes that it takes while it is kept.
        made: the link that makes it; -1: it is computed from the batch, by whoever needs it.
        used: links that use it, ascending.
        saved: links that keep it for their backward pass, ascending.
        grad: whether a gradient comes back.
    """

    message: int
    held: int
    made: int
    used: tuple[int, ...]
    saved: tuple[int, ...] = ()
    grad: bool = True


@dataclass(frozen=True, slots=True)
class Link:
    """One link of the chain.

    Attributes:
        layer: what it needs.
        message: bytes to send where the step is cut before this link; 0 for the first.
        constants: bytes of tensors that the module holds but does not save, by the first link that uses them.
    """

    layer: Layer
    message: int = 0
    constants: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """What the optimizer does to one element of a parameter.

    Attributes:
        kernels: of one element: `bytes` and `flops` are to be multiplied with the elements.
        state_bytes: that it keeps for each element.
        together: whether a kernel takes all parameters at once, not one after the other.
        temporary_bytes: that it needs for a moment for each element, where it takes all at once, as on a GPU.
    """

    kernels: tuple[Kernel, ...] = ()
    state_bytes: float = 0.0
    together: bool = False
    temporary_bytes: float = 0.0

    def at_once(self, device: str) -> bool:
        """Whether a kernel takes all parameters at once on this kind of device."""
        return self.together or device == "gpu"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """See the module's docstring.

    Attributes:
        name: of the workload.
        tp: tensor-parallel workers that it is for.
        sp: whether activations are cut along the sequence.
        microbatch: samples.
        precision: `float32` or `bf16`.
        device: kind of device that it is for, `gpu` or `cpu`: they run other kernels and keep other tensors.
        batch_size: global, as the workload has it.
        links: the chain.
        parameters: and buffers, in the order of the module.
        values: that links hand to each other.
        blocks: indices of the parameters of each repeated block of the module, in its order; see `parallel.blocks`.
        update: of the optimizer.
        weighted: whether the workload has its own weight, which replicas add up in each step.
        clipped: whether gradients are clipped.
        split: whether gradients of weights are apart from those of inputs (zero-bubble).
        cut: whether the step could be traced, so that tp and pp are possible.
        ready: indices of trained parameters in the order in which their gradients are complete.
        batch_bytes: of the data of one microbatch.
        notes: what a person should know, one line each.
    """

    name: str
    tp: int
    sp: int
    microbatch: int
    precision: str
    device: str
    batch_size: int
    links: tuple[Link, ...]
    parameters: tuple[Parameter, ...]
    values: tuple[Value, ...]
    blocks: tuple[tuple[int, ...], ...] = ()
    update: Update = Update()
    weighted: bool = False
    clipped: bool = False
    split: bool = False
    cut: bool = True
    ready: tuple[int, ...] = ()
    batch_bytes: int = 0
    notes: tuple[str, ...] = ()
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)
    """What has been derived of it, by what it was derived for."""

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """Sums of the bytes kept for the backward pass of links 0 to i: one entry more than links.

        A value that several links keep counts where it is kept first.
        """
        own = [link.layer.inside for link in self.links]
        for value in self.values:
            if value.saved:
                own[value.saved[0]] += value.held
        return tuple(accumulate(own, initial=0))

    @cached_property
    def products(self) -> tuple[int, ...]:
        """Sums of the bytes of the results of products of links 0 to i: one entry more than links."""
        return tuple(accumulate((link.layer.products for link in self.links), initial=0))

    @cached_property
    def live(self) -> tuple[tuple[Value, ...], ...]:
        """Before each link, and behind the last: the values that are made before and used from there on."""
        found: list[list[Value]] = [[] for _ in range(len(self.links) + 1)]
        for value in self.values:
            for link in range(max(value.made + 1, 0), value.used[-1] + 1):
                found[link].append(value)
        return tuple(map(tuple, found))

    def crossing(self, first: int, end: int) -> list[Value]:
        """Values that come into links `first` to `end` from outside, or leave them."""
        arriving = [value for value in self.live[first] if any(first <= link < end for link in value.used)]
        return arriving + [value for value in self.live[end] if value.made >= first]

    @cached_property
    def _users(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.links]
        for index, parameter in enumerate(self.parameters):
            for link in parameter.links:
                found[link].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def kinds_of_links(self) -> tuple[int, ...]:
        """For each link a number that links share which do, keep and complete the same, wherever they lie."""
        own = [self.saved[link + 1] - self.saved[link] for link in range(len(self.links))]
        known: dict[object, int] = {}
        return tuple(
            known.setdefault((id(link.layer), kept, self._used_by(number)), len(known))
            for number, (link, kept) in enumerate(zip(self.links, own, strict=True))
        )

    def _used_by(self, link: int) -> tuple[object, ...]:
        """The parameters of a link, each with how far the other links are that use it."""
        used = ((self._kinds[index], self.parameters[index].links) for index in self._users[link])
        return tuple((kind, tuple(other - link for other in links)) for kind, links in used)

    def within(self, first: int, end: int) -> tuple[int, ...]:
        """Indices of the parameters that links `first` to `end` use, ascending."""
        users = self._users
        return self.kept.once(("within", first, end), lambda: tuple(sorted(set(chain.from_iterable(users[first:end])))))

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """Indices of the parameters that several links use."""
        return tuple(index for index, parameter in enumerate(self.parameters) if len(parameter.links) > 1)

    @cached_property
    def _kinds(self) -> tuple[int, ...]:
        """For each parameter the index of the first one that is like it but for its name and its links."""
        first: dict[object, int] = {}
        return tuple(
            first.setdefault((p.shape, p.itemsize, p.trained, p.cut, p.summed, p.buffer), index)
            for index, p in enumerate(self.parameters)
        )

    def kinds_within(self, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[Parameter, int], ...]:
        """(one of them, how many) of the parameters that ranges of links use, like ones together, in their order."""

        def count() -> tuple[tuple[Parameter, int], ...]:
            indices = {index for first, end in ranges for index in self.within(first, end)}
            counts = Counter(map(self._kinds.__getitem__, sorted(indices)))
            return tuple((self.parameters[kind], many) for kind, many in counts.items())

        return self.kept.once(("kinds within", ranges), count)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest trained parameter."""
        return max((self.parameters[index].bytes for index in self.trained), default=0)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Indices of the trained parameters."""
        return tuple(index for index, parameter in enumerate(self.parameters) if parameter.trained)

    @cached_property
    def flops(self) -> float:
        """Floating point operations of one microbatch on one worker, forward and backward, without recomputation."""
        total = 0.0
        for link in self.links:
            layer = link.layer
            for each in (layer.forward, layer.backward, layer.weights):
                total += sum(kernel.flops * kernel.count for kernel in each.kernels)
        return total
