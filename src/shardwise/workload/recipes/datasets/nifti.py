"""NIfTI files with untrusted headers.

A gzip of some kilobytes unpacks to gigabytes, and a header of 348 bytes can state any number of voxels. Both are
compared with the size of the file, and with a maximum, before a voxel is read.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import Any

from shardwise.errors import DataError
from shardwise.files import check_regular
from shardwise.units import format_bytes

MOST_BYTES = 8 << 30
"""Largest unpacked voxel data of one file in bytes."""

MOST_HEADER = 16 << 20
"""Most bytes before the voxels, including the header's extensions."""

GZIP_RATIO = 1032
"""Largest number of bytes that one byte of a gzip unpacks to (zlib's technical details)."""

_SIZES = {348: (108, "f"), 540: (168, "q")}
"""Map from the header's size, NIfTI-1 and NIfTI-2, to the position and struct format of the voxels' start."""


def open_nifti(path: Path) -> Any:
    """Open a NIfTI file as nibabel's image without reading its voxels.

    Raises:
        DataError: the file is not regular or not NIfTI, or states more voxels than it holds or than are read.
    """
    import nibabel

    packed = check_regular(path, DataError)
    version = _checked_header(path)
    image: Any = (nibabel.Nifti1Image if version == 348 else nibabel.Nifti2Image).from_filename(path)
    stated = math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
    holds = packed * GZIP_RATIO if path.suffix == ".gz" else packed
    if stated > holds:
        raise DataError(
            f"{path} states {image.shape} voxels of {format_bytes(stated)}, a file of {format_bytes(packed)} cannot "
            "hold them: it is cut short, or was made to fill the memory"
        )
    if stated > MOST_BYTES:
        raise DataError(f"{path} has {format_bytes(stated)} of voxels: at most {format_bytes(MOST_BYTES)} are read")
    return image


def _checked_header(path: Path) -> int:
    """Return the header's size, which tells the NIfTI version.

    Raises DataError if the file has no valid header or if its extensions are too long.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        head = file.read(max(_SIZES))
    for order in "<>":
        size = struct.unpack_from(f"{order}i", head)[0] if len(head) >= min(_SIZES) else 0
        if size in _SIZES and len(head) >= size:
            place, kind = _SIZES[size]
            start = struct.unpack_from(f"{order}{kind}", head, place)[0]
            if not 0 <= start <= MOST_HEADER:
                raise DataError(f"{path} states that its voxels begin at byte {start:g}: at most {MOST_HEADER} is read")
            return int(size)
    raise DataError(f"{path} cannot be read as NIfTI: its header is none")
