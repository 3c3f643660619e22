"""Whether boxes fill a tensor exactly: every element in one of them, none in two.

Boxes that lie in the tensor and have as many elements as it cover it exactly if no two overlap. Two boxes do not
overlap where a plane lies between them, so boxes are parted along planes that cross none of them, again and again
until each is alone. All that strategies cut is parted like this in one level per dimension. The work is bounded, which
comparing each box with each other is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardwise.parallel.layout import Box

MOST_DIMENSIONS = 16
"""Dimensions of a tensor in a checkpoint."""

_LEVELS = 2 * MOST_DIMENSIONS

Placed = tuple[Box, Box]
"""Offsets and sizes of a box."""


def cover_problem(shape: Box, boxes: Sequence[Placed]) -> str:
    """Return one line on why boxes do not fill a tensor exactly; empty where they do."""
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
    """Return whether planes part all boxes from each other, in at most so many levels."""
    if len(boxes) <= 1:
        return True
    for dim in range(len(boxes[0][0]) if levels else 0):
        groups = _parted(boxes, dim)
        if len(groups) > 1:
            return all(_apart(group, levels - 1) for group in groups)
    return False


def _parted(boxes: Sequence[Placed], dim: int) -> list[list[Placed]]:
    """Group boxes along a dimension: between two groups lies a plane that crosses no box."""
    groups: list[list[Placed]] = []
    end = 0
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        offsets, sizes = box
        if not groups or offsets[dim] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, offsets[dim] + sizes[dim])
    return groups
