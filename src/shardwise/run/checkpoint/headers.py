"""Check of a checkpoint's files against its index, by their headers alone.

The safetensors package validates each header: at most 100 MB, tensors without gaps, and a file of exactly that length.
An index that agrees with the headers therefore cannot claim more bytes than the files have.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shardwise.errors import CheckpointError
from shardwise.run.checkpoint.folder import check_file
from shardwise.run.checkpoint.index import Index
from shardwise.run.jsonfile import short

_Header = dict[str, tuple[str | None, list[int]]]
"""Name of a stored tensor -> its dtype in the file's spelling, and its shape."""


def header_problem(folder: Path, index: Index, part: int = 0, parts: int = 1) -> str:
    """Return one line on the first file whose header differs from the index. Returns an empty string if all agree.

    With `parts` several workers share the work: only every `parts`-th file is checked, from number `part` on.
    """
    expected: dict[str, _Header] = defaultdict(dict)
    for stored in index.tensors.values():
        for chunk in stored.chunks:
            expected[chunk.file][chunk.key] = (stored.spec.code, list(chunk.sizes))
    for name in sorted(expected)[part::parts]:
        try:
            problem = _difference(_header(folder, name), expected[name])
        except CheckpointError as error:
            return str(error)
        if problem:
            return f"checkpoint {folder} is damaged: {name} {problem}"
    return ""


def _header(folder: Path, name: str) -> _Header:
    check_file(folder, name)
    try:
        with safe_open(folder / name, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
            return {key: (part.get_dtype(), list(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {name}: {short(str(error))}") from None


def _difference(found: _Header, expected: _Header) -> str:
    for key in sorted(found.keys() | expected.keys()):
        if key not in found:
            return f"does not hold {short(key)}"
        if key not in expected:
            return f"holds {short(key)}, of which index.json says nothing"
        if found[key] != expected[key]:
            return f"holds {short(key)} as {found[key]}, index.json says {expected[key]}"
    return ""
