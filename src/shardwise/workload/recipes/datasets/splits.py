"""Splits into training and held-out samples that depend on the data alone, so that all processes agree."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

import torch


def stratified_split(labels: Sequence[int], share: float = 0.2) -> tuple[list[int], list[int]]:
    """Split indices into (training, held-out); about `share` of each class is held out, if it has two or more samples.

    At least one sample of such a class is held out.
    """
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    held_out: set[int] = set()
    for label, members in by_class.items():
        generator = torch.Generator().manual_seed(label)
        order = torch.randperm(len(members), generator=generator).tolist()
        count = max(round(share * len(members)), min(1, len(members) - 1))
        held_out.update(members[place] for place in order[:count])
    return [i for i in range(len(labels)) if i not in held_out], sorted(held_out)


def split_names(names: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Split names into (training, held-out), each in the given order; a hash of the name decides.

    At least one name is held out and one is left to train on, so there must be two.
    """
    ranked = sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))
    held_out = set(ranked[: max(1, round(share * len(names)))])
    return [n for n in names if n not in held_out], [n for n in names if n in held_out]
