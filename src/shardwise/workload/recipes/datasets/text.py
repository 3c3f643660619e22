"""Text as tokens: Python's own standard library, the user's text files byte by byte, or files of token ids.

Forms of a user's `data`:

    folder with train.bin and val.bin (or .npy)    token ids, one split each
    file.bin                                       token ids without a header, little-endian uint16 (nanoGPT's
                                                   convention) or in `token_dtype`; its last tenth is held out
    file.npy                                       token ids, a one-dimensional array of integers; its last tenth too
    any other file, a folder, a pattern (*.txt)    text, one token per byte; about a twentieth of several files is
                                                   held out, and the last tenth of a single one
"""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import DataError
from shardwise.files import check_regular, read_regular
from shardwise.units import format_bytes
from shardwise.workload.recipes.datasets.cache import Array, LazyArray, cached, fingerprint
from shardwise.workload.recipes.datasets.splits import split_names

_TOKENS = (".bin", ".npy")
_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
_BYTES = 256
_CHUNK = 1 << 24

MOST_BYTES = 8 << 30
"""Most bytes of text that are joined in memory."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out split of a text; each is a span of a one-dimensional array of tokens."""

    train: Span
    held_out: Span
    vocabulary: int
    unit: str
    """Unit of a token: `byte` or `token`."""


@dataclass(frozen=True)
class Span:
    """Tokens from `first` to before `last` of an array."""

    tokens: LazyArray
    first: int
    last: int


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of `sequence + 1` tokens, so that each token but the first is the target of those before it.

    If `count` is None, windows follow each other so that every token is a target once; else `count` windows are spread
    evenly over the span. Samples: `tokens`, int64 (sequence + 1,).

    Raises:
        DataError: the span is shorter than one window.
    """

    def __init__(self, span: Span, sequence: int, count: int | None = None) -> None:
        tokens = span.last - span.first
        if tokens < sequence + 1:
            raise DataError(f"sequence={sequence}: the text has only {tokens} tokens; use {max(1, tokens - 1)} or less")
        self.span = span
        self.sequence = sequence
        self.count = (tokens - 1) // sequence
        self.stride = sequence
        if count is not None and count < self.count:
            self.count = count
            self.stride = (tokens - sequence - 1) // max(1, count - 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        start = self.span.first + index * self.stride
        window = self.span.tokens.array[start : start + self.sequence + 1]
        return {"tokens": torch.from_numpy(window.astype(np.int64))}


@cache
def standard_library() -> Corpus:
    """Read the `.py` files of Python's standard library byte by byte, which stay as they are while a process runs.

    Raises:
        DataError: it has fewer than two.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root) if path.suffix == ".py"]
    if len(files) < 2:
        raise DataError(f"Python's standard library has no source files in {root}: give text of your own with data=")
    return _texts("standard-library", root, files)


def user_corpus(data: str, token_dtype: str, vocabulary: int | None) -> Corpus:
    """Read the user's text or tokens, see the module's docstring.

    A `vocabulary` of None means as many tokens as the data needs.

    Raises:
        DataError: the data is missing, has no text, or has token ids that are negative or not below `vocabulary`.
    """
    path = Path(data).expanduser()
    pair = _token_pair(path)
    if pair is not None:
        return _tokens(list(pair), token_dtype, vocabulary)
    if os.path.isfile(path) and path.suffix in _TOKENS:
        return _tokens([path], token_dtype, vocabulary)
    corpus = _user_text(path, data)
    if vocabulary is not None and vocabulary < _BYTES:
        raise DataError(f"vocabulary={vocabulary}: text is read byte by byte and needs {_BYTES}")
    return corpus if vocabulary is None else Corpus(corpus.train, corpus.held_out, vocabulary, corpus.unit)


def _token_pair(folder: Path) -> tuple[Path, Path] | None:
    pairs = ((folder / f"train{suffix}", folder / f"val{suffix}") for suffix in _TOKENS)
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), None)


def _user_text(path: Path, data: str) -> Corpus:
    if os.path.isdir(path):
        files = [file for file in _walk(path) if _is_text(file)]
    else:
        if os.path.exists(path):
            check_regular(path, DataError, "data")
        found = [path] if os.path.isfile(path) else sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in found if file.is_file() and file.stat().st_size]
    if not files:
        missing = "no text files in it" if path.is_dir() else "there is no such file with anything in it"
        raise DataError(f"data={data}: {missing}")
    if len(files) > 1:
        root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
        return _texts("text", root, files)
    lazy = _joined("text", files)
    return _last_tenth(lazy, _BYTES, "byte")


def _walk(root: Path) -> list[Path]:
    """List all regular files below a folder, sorted, without hidden files and installed packages."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        visible = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        files += [path for path in visible if path.is_file()]  # reading a pipe or a device could block
    return files


def _is_text(path: Path) -> bool:
    """Return whether a file is text by git's rule: it has no NUL among its first 8,000 bytes and is not empty."""
    with path.open("rb") as file:
        head = file.read(8000)
    return bool(head) and b"\0" not in head


def _texts(name: str, root: Path, files: list[Path]) -> Corpus:
    by_name = {path.relative_to(root).as_posix(): path for path in files}
    train, held_out = ([by_name[key] for key in names] for names in split_names(list(by_name), share=0.05))
    return Corpus(_whole(_joined(name, train)), _whole(_joined(f"{name}-held-out", held_out)), _BYTES, "byte")


def _joined(name: str, files: list[Path]) -> LazyArray:
    if sum(path.stat().st_size for path in files) > MOST_BYTES:
        raise DataError(
            f"{files[0].parent} has more than {format_bytes(MOST_BYTES)} of text, which is read into memory: "
            "give it as token ids (.bin), which are not"
        )
    key = [sys.implementation.cache_tag, fingerprint(files)]
    return LazyArray(partial(cached, name, key, partial(_join, files)))


def _join(files: list[Path]) -> Array:
    sizes = [check_regular(path, DataError) for path in files]
    contents = (read_regular(path, size, DataError) for path, size in zip(files, sizes, strict=True))
    return np.frombuffer(b"\n".join(contents), dtype=np.uint8)


def _whole(tokens: LazyArray) -> Span:
    return Span(tokens, 0, len(tokens.array))


def _last_tenth(tokens: LazyArray, vocabulary: int, unit: str) -> Corpus:
    count = len(tokens.array)
    cut = count - max(1, count // 10)
    return Corpus(Span(tokens, 0, cut), Span(tokens, cut, count), vocabulary, unit)


def _open_tokens(path: Path, dtype: str) -> LazyArray:
    opened: Callable[[], Array] = partial(np.load, path, mmap_mode="r", allow_pickle=False)
    if path.suffix == ".bin":
        opened = partial(np.memmap, path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    lazy = LazyArray(opened)
    try:
        array = lazy.array
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as tokens: {' '.join(str(error).split())}") from error
    if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
        raise DataError(f"{path} must hold integers in one dimension, not {array.dtype} of shape {array.shape}")
    return lazy


def _tokens(files: list[Path], dtype: str, vocabulary: int | None) -> Corpus:
    splits = [_open_tokens(path, dtype) for path in files]
    needed = 0
    for path, split in zip(files, splits, strict=True):
        key = [fingerprint([path]), dtype]
        lowest, highest = map(int, cached("token-range", key, partial(_range, split)))
        if lowest < 0:
            raise DataError(f"{path} holds {lowest}: token ids are 0 or more")
        if vocabulary is not None and highest >= vocabulary:
            raise DataError(f"vocabulary={vocabulary}: {path} holds token {highest}; use {highest + 1} or more")
        needed = max(needed, highest + 1)
    # vocabularies that are multiples of 64 divide between workers and run fast; the added ids never occur
    size = -(-needed // 64) * 64 if vocabulary is None else vocabulary
    if len(splits) == 1:
        return _last_tenth(splits[0], size, "token")
    train, held_out = splits
    return Corpus(_whole(train), _whole(held_out), size, "token")


def _range(tokens: LazyArray) -> Array:
    """Return the smallest and the largest id as int64 (2,); a memory-mapped file is read in chunks."""
    pieces = [tokens.array[start : start + _CHUNK] for start in range(0, len(tokens.array), _CHUNK)]
    return np.array([min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)])
