"""Test that boxes cover a tensor exactly: each element lies in one box and in no other.

Boxes that lie in the tensor and have as many elements as it cover it exactly if no two overlap. Two boxes do not
overlap if a plane lies between them. Boxes are therefore separated recursively along planes that cross no box, until
each is alone. All layouts that strategies make separate in one level per dimension. The work is bounded by the levels;
comparing all pairs of boxes would be quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardwise.parallel.state.layout import Box

MOST_DIMENSIONS = 16
"""Largest number of dimensions of a tensor in a checkpoint."""

_LEVELS = 2 * MOST_DIMENSIONS

Placed = tuple[Box, Box]
"""Box of a tensor: its offsets and its sizes, one of each per dimension."""


def cover_problem(shape: Box, boxes: Sequence[Placed]) -> str:
    """Return one line on why boxes do not cover a tensor exactly. Returns an empty string if they do."""
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"has {len(shape)} dimensions, a part of it at {offsets} has {len(sizes)}"
        if any(start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            return f"has shape {shape}, a part of it at {offsets} of sizes {sizes} lies outside"
    filled = [box for box in boxes if prod(box[1])]
    written, elements = sum(prod(sizes) for _, sizes in filled), prod(shape)
    if written != elements:
        return f"has {elements} elements, the workers wrote {written} in {len(filled)} parts"
    return "" if _apart(filled, _LEVELS) else f"has {len(filled)} parts that overlap"


def _apart(boxes: Sequence[Placed], levels: int) -> bool:
    """Return whether planes separate all boxes from each other within `levels` levels of recursion."""
    if len(boxes) <= 1:
        return True
    for dim in range(len(boxes[0][0]) if levels else 0):
        groups = _parted(boxes, dim)
        if len(groups) > 1:
            return all(_apart(group, levels - 1) for group in groups)
    return False


def _parted(boxes: Sequence[Placed], dim: int) -> list[list[Placed]]:
    """Group boxes along a dimension, so that a plane which crosses no box lies between each two groups."""
    groups: list[list[Placed]] = []
    end = 0
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        offsets, sizes = box
        if not groups or offsets[dim] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, offsets[dim] + sizes[dim])
    return groups
