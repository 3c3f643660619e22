"""Condense a profile to what the bounds of the search need: distinct layers with counts, and sums over parameters.

A model of a hundred equal blocks becomes as small as one of two, so that a search can afford thousands of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profile import Layer, Profile, Update, module_blocks
from shardwise.predict.runtime.runtime import SHARDWISE, Runtime


@dataclass(frozen=True, slots=True)
class EqualSegments:
    """Equal segments: their layer, their number, and how many of them lie in repeated blocks of the module."""

    layer: Layer
    count: int
    repeated: int


@dataclass(frozen=True)
class ProfileSummary:
    """A profile without the order of its segments. All bytes are those of one rank.

    Attributes:
        tp: degree of tensor parallelism.
        precision: `float32` or `bf16`.
        layers: distinct layers, in the order of their first occurrence.
        parameters: bytes of parameters and buffers.
        gradients: bytes of trained parameters.
        elements: number of elements of trained parameters.
        own: bytes of the trained parameters that only one segment uses, without those that stay in float32.
        repeated: bytes of the trained parameters in repeated blocks of the module, without those that stay in float32.
        blocks: number of repeated blocks of the module.
        message: bytes of the smallest message at any cut point.
        narrow: number of cut points with a message of that size.
        saved: bytes that one microbatch saves for the backward pass.
        products: bytes of one microbatch's results that selective recomputation keeps, see
            `parallel.operators.selective_checkpoint`.
        repeated_products: the part of `products` in repeated blocks of the module.
        largest: most bytes that the backward pass of any one segment needs, even with recomputation: what it saves,
            plus the temporary tensors of its forward or backward pass.
        update: kernels and state of the optimizer.
        runtime: the software that runs the step.
        gathered, reduced, scattered: as in `Profile`.
    """

    tp: int
    precision: str
    layers: tuple[EqualSegments, ...]
    parameters: int
    gradients: int
    elements: int
    own: int
    repeated: int
    blocks: int
    message: int
    narrow: int
    saved: int
    products: int
    repeated_products: int
    largest: int
    update: Update
    runtime: Runtime = SHARDWISE
    gathered: float = 1.0
    reduced: float = 1.0
    scattered: float = 1.0
    half: float = 0.5
    memo: Memo = field(default_factory=Memo, repr=False, compare=False)
    """Cache of everything derived from this value."""


def summarize(profile: Profile) -> ProfileSummary:
    """Return the summary of a profile, cached with the profile."""
    return profile.memo.once(("summary",), lambda: _summarized(profile))


def _summarized(profile: Profile) -> ProfileSummary:
    trained = [parameter for parameter in profile.parameters if parameter.trained]
    messages = [segment.message for segment in profile.segments[1:]]
    blocks = {index for block in profile.blocks for index in block}
    inside = {segment for first, end in module_blocks(profile) for segment in range(first, end)}
    layers: dict[int, Layer] = {}
    counts: dict[int, list[int]] = {}
    for number, segment in enumerate(profile.segments):
        layers[id(segment.layer)] = segment.layer
        count = counts.setdefault(id(segment.layer), [0, 0])
        count[0] += 1
        count[1] += number in inside
    return ProfileSummary(
        tp=profile.tp,
        precision=profile.precision,
        layers=tuple(EqualSegments(layer, *counts[key]) for key, layer in layers.items()),
        parameters=sum(parameter.bytes for parameter in profile.parameters),
        gradients=sum(parameter.bytes for parameter in trained),
        elements=sum(parameter.elements for parameter in trained),
        own=sum(parameter.bytes for parameter in trained if len(parameter.segments) == 1 and not parameter.kept),
        repeated=sum(
            p.bytes for index, p in enumerate(profile.parameters) if p.trained and not p.kept and index in blocks
        ),
        blocks=len(profile.blocks),
        message=min(messages, default=0),
        narrow=sum(size <= min(messages) for size in messages),
        saved=profile.saved[-1],
        products=profile.products[-1],
        repeated_products=sum(profile.segments[segment].layer.products for segment in inside),
        largest=max((_backwards(layer) for layer in layers.values()), default=0),
        update=profile.update,
        runtime=profile.runtime,
        gathered=profile.gathered,
        reduced=profile.reduced,
        scattered=profile.scattered,
        half=profile.half,
    )


def _backwards(layer: Layer) -> int:
    return layer.inside + max(layer.temporary_backward, layer.temporary_forward)
