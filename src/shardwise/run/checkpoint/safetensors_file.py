"""Writer of safetensors files, one tensor at a time, so that memory is bounded by the largest tensor, not by the file.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header of
`{name: {"dtype", "shape", "data_offsets"}}`, then the bytes of the tensors without gaps. Reading is left to the
safetensors package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from shardwise.errors import ShardwiseError
from shardwise.run.checkpoint.checked_file import FileSum, write_file

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}
"""All dtypes of safetensors files, by their names in torch without `torch.`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return the size of the tensor's values in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def code(self) -> str | None:
        """Return the dtype in the spelling of safetensors files. Returns None for a dtype that they cannot hold."""
        return _CODES.get(self.dtype)


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileSum:
    """Write a safetensors file, wait until it is on disk, and return its size and CRC-32.

    Args:
        path: path of the new file; it must not exist.
        specs: dtype and shape of every tensor in the file.
        read: function that returns a tensor by its name, on any device and with any strides. It is called once per
            tensor, just before the tensor is written.
        metadata: texts to store in the header.

    Raises:
        ShardwiseError: the format does not have the dtype of a tensor, or a tensor differs from its spec.
        OSError: the file cannot be written, for example because the disk is full.
    """
    # wide elements first, so that every tensor begins at a multiple of its element size, which readers rely on
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    return write_file(path, _blocks(names, specs, read, metadata))


def _blocks(
    names: list[str],
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None,
) -> Iterator[memoryview | bytes]:
    yield _header(names, specs, metadata)
    for name in names:
        tensor, spec = read(name), specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ShardwiseError(
                f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {spec.dtype} {spec.shape}"
            )
        if tensor.numel():
            # numpy has no bfloat16, so the values are viewed as uint8
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(names: list[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        spec = specs[name]
        if spec.code is None:
            raise ShardwiseError(f"tensor {name} is {spec.dtype}, which safetensors files cannot hold")
        end = offset + spec.bytes
        header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
