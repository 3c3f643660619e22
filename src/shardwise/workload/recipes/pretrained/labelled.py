"""Labelled text for a classifier: files with one text and its label a line.

    file.csv, file.tsv    a header line with the columns `text` and `label`
    file.jsonl            one object a line, {"text": "...", "label": 1}
    folder                train.csv (or .tsv, .jsonl), and validation.csv if there is one

A label is a number from 0 on, or a name. Without a validation file a tenth of each class is held out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import DataError
from shardwise.files import read_regular_text
from shardwise.workload.recipes.datasets.splits import stratified_split
from shardwise.workload.recipes.pretrained.architecture import CONFIG, Architecture
from shardwise.workload.recipes.pretrained.tokens import tokenizer_of, tokenizer_path

FORMS = "a .csv or .tsv file with columns text and label, a .jsonl file, or a folder with train.csv"
HELD_OUT_SHARE = 0.1
LARGEST_FILE = 4 << 30
"""Largest size of a file of labelled text in bytes."""

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_HELD_OUT = ("validation", "val", "dev", "test")
_Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class LabelledText:
    """Training and held-out texts with their labels by name, and the number of each name."""

    train: _Rows
    held_out: _Rows
    numbers: dict[str, int]


def labelled_text(architecture: Architecture, data: str | None) -> LabelledText:
    """Read labelled text. Raises DataError if there is none, or its labels do not fit the configuration."""
    if data is None:
        raise DataError(
            f"{architecture.name} in {architecture.folder} classifies text: give labelled text with data=: {FORMS}; "
            "other data go through a workload function (file.py:function)"
        )
    train, held_out = _splits(Path(data).expanduser())
    numbers = _numbers(architecture, {label for _, label in [*train, *held_out]}, data)
    if not held_out:
        kept, rest = stratified_split([numbers[label] for _, label in train], HELD_OUT_SHARE)
        train, held_out = [train[i] for i in kept], [train[i] for i in rest]
    return LabelledText(train, held_out, numbers)


def _splits(path: Path) -> tuple[_Rows, _Rows]:
    if not path.is_dir():
        return _rows(path), []
    found = {name: _first_file(path, name) for name in ("train", *_HELD_OUT)}
    train = found.pop("train")
    if train is None:
        raise DataError(f"data={path}: the folder has no train{' or train'.join(_SUFFIXES)}: give {FORMS}")
    held_out = next(filter(None, found.values()), None)
    return _rows(train), [] if held_out is None else _rows(held_out)


def _first_file(folder: Path, name: str) -> Path | None:
    return next((folder / f"{name}{suffix}" for suffix in _SUFFIXES if (folder / f"{name}{suffix}").exists()), None)


def _rows(path: Path) -> _Rows:
    if path.suffix not in _SUFFIXES or not path.exists():
        problem = "there is no such file" if not path.exists() else "is not labelled text"
        raise DataError(f"data={path}: {problem}: give {FORMS}")
    content = read_regular_text(path, LARGEST_FILE, DataError, "data")
    objects = _objects(content, path) if path.suffix == ".jsonl" else _table(content, path)
    rows = [_row(each, number, path) for number, each in enumerate(objects, 1)]
    if not rows:
        raise DataError(f"data={path}: no texts in it: give {FORMS}")
    return rows


def _table(text: str, path: Path) -> Iterable[Any]:
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 26))
    try:
        tabs = path.suffix == ".tsv"
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ","))
    except csv.Error as error:
        raise DataError(f"data={path} cannot be read: {error}") from error


def _objects(text: str, path: Path) -> Iterable[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"data={path}, line {number}: is not JSON: {error}") from error


def _row(values: Any, number: int, path: Path) -> tuple[str, str]:
    text, label = (values.get("text"), values.get("label")) if isinstance(values, dict) else (None, None)
    if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise DataError(f"data={path}, row {number}: has no text and label: give {FORMS}")
    return text, str(label)


def _numbers(architecture: Architecture, labels: set[str], data: str) -> dict[str, int]:
    """Return the number of each label: itself, that of the configuration, or its place among the sorted names."""
    count, known = architecture.config.num_labels, architecture.config.label2id or {}
    if all(label.isdecimal() for label in labels):
        numbers = {label: int(label) for label in labels}
    elif labels <= known.keys():
        numbers = {label: int(known[label]) for label in labels}
    elif set(known) == {f"LABEL_{number}" for number in range(count)}:  # names that say nothing
        numbers = {label: number for number, label in enumerate(sorted(labels))}
    else:
        unknown = min(labels - known.keys())
        raise DataError(f"data={data}: label {unknown!r} is not in label2id of {architecture.folder / CONFIG}")
    wrong = next((label for label, number in numbers.items() if number >= count), None)
    if wrong is not None:
        raise DataError(
            f"data={data}: label {wrong!r} is class {numbers[wrong]}, {architecture.name} has {count} classes: set "
            f"num_labels to {max(numbers.values()) + 1} or more in {architecture.folder / CONFIG}"
        )
    return numbers


class Classified(Dataset[dict[str, Tensor]]):
    """Texts of one length in tokens, with their classes: `tokens` and `attention` int64 (sequence,), `label` int64 0-d.

    Longer texts are cut, shorter ones are padded.
    """

    def __init__(self, rows: Sequence[tuple[str, str]], numbers: dict[str, int], folder: Path, pad: int, sequence: int):
        self._rows, self._numbers, self._pad, self._sequence = rows, numbers, pad, sequence
        self._path = tokenizer_path(folder)
        self._tokenizer: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text, label = self._rows[index]
        ids = self._ids(text)
        padded = torch.full((self._sequence,), self._pad)
        padded[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention = torch.zeros(self._sequence, dtype=torch.int64)
        attention[: max(1, len(ids))] = 1
        return {"tokens": padded, "attention": attention, "label": torch.tensor(self._numbers[label])}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def _ids(self, text: str) -> list[int]:
        if self._path is None:
            return list(text.encode()[: self._sequence])
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self._path)
            self._tokenizer.enable_truncation(self._sequence)
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids
