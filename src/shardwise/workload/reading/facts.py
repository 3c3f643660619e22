"""Description of what a sample holds, to compare samples of several workers without sending them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

Facts = Mapping[str, str]
"""Place in a sample -> description of the value there, with a checksum if it is not a single number or word."""


def facts_of(sample: Any) -> dict[str, str]:
    """Describe every value in a sample."""
    leaves, _ = tree_flatten_with_path(sample)
    return {keystr(path): _described(leaf) for path, leaf in leaves}


@dataclass(frozen=True, slots=True)
class Difference:
    """First difference between the samples of several workers.

    Attributes:
        sample: name of the sample.
        place: place in the sample; empty for a sample that is one value.
        values: description of the value on each worker.
    """

    sample: str
    place: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"its value at {self.place}" if self.place else "it"


def difference(everybody: Sequence[Sequence[tuple[str, Facts]]]) -> Difference | None:
    """Return the first difference between workers that each have (name, facts) of their samples, in order.

    Returns None if all are equal.
    """
    for each in zip(*everybody, strict=False):
        names = tuple(name for name, _ in each)
        if len(set(names)) > 1:
            return Difference(names[0], "", names)
        places = dict.fromkeys(place for _, facts in each for place in facts)
        for place in places:
            values = tuple(facts.get(place, "nothing") for _, facts in each)
            if len(set(values)) > 1:
                return Difference(names[0], place, values)
    counts = tuple(f"{len(each)} samples" for each in everybody)
    return Difference("the last one", "", counts) if len(set(counts)) > 1 else None


def checksum(values: Any) -> int:
    """Return a checksum of a value made of texts, numbers, lists and dicts, below 2^32."""
    return zlib.crc32(repr(values).encode())


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return _tensor(leaf)
    if isinstance(leaf, str | int | float | complex | bool | None):
        text = repr(leaf)
        return text if len(text) <= 40 else f"{text[:20]}... with checksum {zlib.crc32(text.encode()):08x}"
    content = next(_bytes_of(leaf), None)
    kind = type(leaf).__name__
    return kind if content is None else f"{kind} with checksum {zlib.crc32(content):08x}"


def _tensor(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tuple(tensor.shape)} {tensor.layout}"
    if tensor.numel() == 1:
        return repr(tensor.item())
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} with checksum {zlib.crc32(content):08x}"


def _bytes_of(leaf: Any) -> Iterator[bytes]:
    """Yield the bytes of a value that has any: an array, an image, a number of numpy."""
    if isinstance(leaf, bytes | bytearray):
        yield bytes(leaf)
    elif callable(content := getattr(leaf, "tobytes", None)) and str(getattr(leaf, "dtype", "")) != "object":
        yield content()
