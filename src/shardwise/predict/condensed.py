"""What bounds need of a profile: its different layers, how often each is there, and sums over its parameters.

A model of a hundred equal blocks is as small as one of two, so that thousands of them are made in a search.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardwise.cluster.cluster import Cluster
from shardwise.predict.kept import Kept
from shardwise.predict.parts import module_blocks
from shardwise.predict.profile import Layer, Profile, Update
from shardwise.predict.timing import Seconds
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Counted:
    """Equal links: their layer, how many there are, and how many of these lie in repeated blocks of the module."""

    layer: Layer
    count: int
    repeated: int


@dataclass(frozen=True)
class Condensed:
    """A profile without the order of its links.

    Attributes:
        tp: tensor-parallel workers that it is for.
        precision: `float32` or `bf16`.
        layers: different ones, in the order in which they first come.
        parameters: bytes of parameters and buffers.
        gradients: bytes of what is trained.
        elements: of what is trained.
        own: bytes of what is trained and used by one link alone.
        repeated: bytes of what is trained and lies in repeated blocks of the module.
        message: least bytes to send where the step is cut.
        narrow: places where it may be cut with no more to send than that.
        saved: bytes that are kept of a microbatch for the backward pass.
        products: bytes of results of products of a microbatch.
        repeated_products: the same in repeated blocks of the module.
        largest: most bytes that one link needs while it goes backwards, which recomputation needs too.
        update: of the optimizer.
    """

    tp: int
    precision: str
    layers: tuple[Counted, ...]
    parameters: int
    gradients: int
    elements: int
    own: int
    repeated: int
    message: int
    narrow: int
    saved: int
    products: int
    repeated_products: int
    largest: int
    update: Update
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)
    """What has been derived of it, by what it was derived for."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch, all links together.

    Attributes:
        forward, backward, weights: of the passes, exchanges of tensor parallelism included.
        again: of what is computed again at least: each link up to what its backward pass needs.
        repeated: the same of links in repeated blocks alone.
        rest, repeated_rest: the same two where the results of products are kept.
        seconds: of kernels on the device.
    """

    forward: float
    backward: float
    weights: float
    again: float
    repeated: float
    rest: float
    repeated_rest: float
    seconds: Seconds


def condense(profile: Profile) -> Condensed:
    """Of a profile; kept with it."""
    return profile.kept.once(("condensed",), lambda: _condensed(profile))


def _condensed(profile: Profile) -> Condensed:
    trained = [parameter for parameter in profile.parameters if parameter.trained]
    messages = [link.message for link in profile.links[1:]]
    blocks = {index for block in profile.blocks for index in block}
    inside = {link for first, end in module_blocks(profile) for link in range(first, end)}
    layers: dict[int, Layer] = {}
    counts: dict[int, list[int]] = {}
    for number, link in enumerate(profile.links):
        layers[id(link.layer)] = link.layer
        count = counts.setdefault(id(link.layer), [0, 0])
        count[0] += 1
        count[1] += number in inside
    return Condensed(
        tp=profile.tp,
        precision=profile.precision,
        layers=tuple(Counted(layer, *counts[key]) for key, layer in layers.items()),
        parameters=sum(parameter.bytes for parameter in profile.parameters),
        gradients=sum(parameter.bytes for parameter in trained),
        elements=sum(parameter.elements for parameter in trained),
        own=sum(parameter.bytes for parameter in trained if len(parameter.links) == 1),
        repeated=sum(p.bytes for index, p in enumerate(profile.parameters) if p.trained and index in blocks),
        message=min(messages, default=0),
        narrow=sum(size <= min(messages) for size in messages),
        saved=profile.saved[-1],
        products=profile.products[-1],
        repeated_products=sum(profile.links[link].layer.products for link in inside),
        largest=max((_backwards(layer) for layer in layers.values()), default=0),
        update=profile.update,
    )


def _backwards(layer: Layer) -> int:
    return layer.inside + max(layer.temporary_backward, layer.temporary_forward)


def times_of(condensed: Condensed, cluster: Cluster, strategy: Strategy) -> Times:
    """The times on a cluster; kept for the next strategy that asks for the same."""
    seconds = Seconds.on(cluster, strategy, condensed.tp, condensed.precision)
    return condensed.kept.once(seconds.key, lambda: _timed(condensed, seconds))


def _timed(condensed: Condensed, seconds: Seconds) -> Times:
    forward = backward = weights = again = repeated = rest = repeated_rest = 0.0
    for each in condensed.layers:
        there, back, of_weights = seconds.of_layer(each.layer)
        forward += each.count * there.device
        backward += each.count * back.device
        weights += each.count * of_weights.device
        if each.layer.keeps:
            recomputed = seconds.again(each.layer.recomputed).total
            again += each.count * recomputed
            repeated += each.repeated * recomputed
            others = seconds.again(each.layer.recomputed, products=True).total
            rest += each.count * others
            repeated_rest += each.repeated * others
    return Times(forward, backward, weights, again, repeated, rest, repeated_rest, seconds)
