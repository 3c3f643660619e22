"""Text in the tokens of a folder's `tokenizer.json`, or byte by byte without one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.errors import DataError
from shardwise.files import check_regular, read_regular
from shardwise.workload.recipes.datasets.cache import Array, LazyArray, cached, fingerprint
from shardwise.workload.recipes.datasets.text import Corpus, Span, standard_library, user_corpus
from shardwise.workload.recipes.packages import require
from shardwise.workload.recipes.pretrained.architecture import CONFIG, Architecture

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

LARGEST_TOKENIZER = 256 << 20
"""Largest size of a tokenizer's file in bytes."""

SAMPLE_BYTES = 8_000_000
"""Bytes of the standard library that are tokenized: it is a sample, and more would take minutes."""

_BLOCK_BYTES = 4 << 20
"""Bytes of text that are tokenized at once."""

_MASKS = ("[MASK]", "<mask>")


def corpus_of(architecture: Architecture, data: str | None) -> Corpus:
    """Return the user's text, or the standard library, in the tokens of the architecture's folder.

    Raises:
        DataError: the data or the tokenizer cannot be read, or the vocabulary is too small.
    """
    corpus = standard_library() if data is None else user_corpus(data, "uint16", None)
    vocabulary, path = architecture.vocabulary, tokenizer_path(architecture.folder)
    if corpus.unit == "byte" and path is not None:
        most = SAMPLE_BYTES if data is None else None
        train, held_out = (_tokenized(span, path, most) for span in (corpus.train, corpus.held_out))
        return Corpus(train, held_out, vocabulary, "token")
    if corpus.vocabulary > vocabulary:
        raise DataError(
            f"vocab_size={vocabulary} of {architecture.folder / CONFIG}: the data has {corpus.vocabulary} different "
            f"{corpus.unit}s; use a larger vocab_size, or put the model's {TOKENIZER} into the folder"
        )
    return corpus


def tokenizer_path(folder: Path) -> Path | None:
    """Return the path of a folder's tokenizer, or None. Raises DataError if it is not a regular file, or too large."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    check_regular(path, DataError, limit_bytes=LARGEST_TOKENIZER)
    return path


def tokenizer_of(path: Path) -> Any:
    """Read a tokenizer, without the truncation and padding that it may be stored with. Raises DataError."""
    made = require("tokenizers", "tokenizers", "huggingface").Tokenizer
    try:
        tokenizer = made.from_file(str(path))
    except Exception as error:
        raise DataError(f"{path} cannot be read as a tokenizer: {' '.join(str(error).split())[:300]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def mask_token(architecture: Architecture) -> int:
    """Return the id that hides a token: that of the tokenizer, or the last id of the vocabulary without a tokenizer.

    Raises:
        DataError: the tokenizer has no mask token, or its id is not in the vocabulary.
    """
    path = tokenizer_path(architecture.folder)
    if path is None:
        return architecture.vocabulary - 1
    tokenizer, named = tokenizer_of(path), _named_mask(architecture.folder)
    for text in [named] if named else _MASKS:
        found = tokenizer.token_to_id(text)
        if found is not None:
            return _checked(int(found), architecture, path)
    raise DataError(
        f"{path} has no mask token ({named or ' or '.join(_MASKS)}), which a masked language model needs: name it as "
        f"mask_token in {TOKENIZER_CONFIG}"
    )


def _checked(token: int, architecture: Architecture, path: Path) -> int:
    if token >= architecture.vocabulary:
        raise DataError(
            f"{path}: the mask token has id {token}, vocab_size={architecture.vocabulary} of "
            f"{architecture.folder / CONFIG}: use {token + 1} or more"
        )
    return token


def _named_mask(folder: Path) -> str:
    """Return the mask token that the tokenizer's configuration names, or an empty string."""
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return ""
    try:
        named = json.loads(read_regular(path, LARGEST_TOKENIZER, DataError)).get("mask_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else ""


def _tokenized(span: Span, tokenizer: Path, most: int | None) -> Span:
    last = span.last if most is None else min(span.last, span.first + most)
    part = Span(span.tokens, span.first, last)
    key = ["without truncation", fingerprint([tokenizer]), part.first, part.last, _checksum(part)]
    lazy = LazyArray(partial(cached, "tokenized", key, partial(_tokens, part, tokenizer)))
    return Span(lazy, 0, len(lazy.array))


def _checksum(span: Span) -> int:
    return zlib.crc32(span.tokens.array[span.first : span.last].tobytes())


def _tokens(span: Span, tokenizer: Path) -> Array:
    encoder = tokenizer_of(tokenizer)
    ids = [
        np.array(each.ids, dtype=np.uint32)
        for text in _blocks(span)
        for each in encoder.encode_batch(_pieces(text), add_special_tokens=False)
    ]
    return np.concatenate(ids) if ids else np.zeros(0, dtype=np.uint32)


def _blocks(span: Span) -> Iterator[str]:
    """Yield the text in blocks that end with a line, so that memory is bounded."""
    start = span.first
    while start < span.last:
        block = span.tokens.array[start : min(span.last, start + _BLOCK_BYTES)].tobytes()
        cut = block.rfind(b"\n") + 1 if start + len(block) < span.last else len(block)
        block = block[: cut or len(block)]
        yield block.decode(errors="replace")
        start += len(block)


def _pieces(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    return ["".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]
