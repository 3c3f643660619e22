"""Labelled images: scikit-learn's handwritten digits, or the user's folder with one sub-folder per class."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import DataError
from shardwise.files import check_regular
from shardwise.workload.recipes.checks import check_at_most
from shardwise.workload.recipes.datasets.cache import Array, cached
from shardwise.workload.recipes.datasets.splits import stratified_split
from shardwise.workload.recipes.packages import folder_of, require

Sample = dict[str, Tensor]
"""Sample with `image`: float32 (channels, size, size), normalised; and `label`: int64 ()."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Pillow's formats, detected by content; formats that run a program, such as EPS, are left out."""

LARGEST_DIGITS = 1024
"""Largest side of the digits in pixels: all of them are scaled at once, which then takes 7.5 GB."""

MOST_PIXELS = 128_000_000
"""Most pixels of an image: half a gigabyte in memory."""

_HELD_OUT = ("val", "valid", "validation", "test")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's colours, the usual normalisation of photographs."""


class ImageTensors(Dataset[Sample]):
    """Images in memory: (samples, channels, size, size), and labels (samples,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], "label": self.labels[index]}


class ImageFiles(Dataset[Sample]):
    """Images that are read on access, scaled so that the short side is `size` and cropped to the centre square."""

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files[index]
        pixels = torch.from_numpy(_read(path, self.size)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
        return {"image": (pixels - mean) / std, "label": torch.tensor(label)}


@dataclass(frozen=True)
class Images:
    """Training and held-out split of a classification task; samples are `Sample`s."""

    train: ImageTensors | ImageFiles
    held_out: ImageTensors | ImageFiles
    size: int
    channels: int
    classes: int


def _read(path: Path, size: int) -> Array:
    from PIL import Image, ImageOps

    check_regular(path, DataError)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_pixels(path, *image.size)
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow raises for damaged files
        raise DataError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error
    return np.array(fitted)


def _check_pixels(path: Path, width: int, height: int) -> None:
    """Raise DataError for too many pixels before decoding, because a small file can claim to have gigapixels."""
    if width * height > MOST_PIXELS:
        raise DataError(f"{path} has {width} x {height} pixels: at most {MOST_PIXELS} are read; make it smaller")


def digits(size: int = 8) -> Images:
    """Load 1,797 handwritten digits of 8 x 8 pixels; a fifth of each class is held out, other sizes are interpolated.

    Raises:
        WorkloadError: scikit-learn is not installed, or `size` is above `LARGEST_DIGITS`.
    """
    check_at_most(LARGEST_DIGITS, image_size=size)
    folder_of("sklearn", "scikit-learn", "image")  # imported only if the cache has no digits, because it takes seconds
    version = importlib.metadata.version("scikit-learn")
    table = torch.from_numpy(np.array(cached("digits", [version], _digits_table)))
    images, labels = table[:, :-1].view(-1, 1, 8, 8).float(), table[:, -1].long()
    train, held_out = stratified_split(labels.tolist())
    images = (images - images[train].mean()) / images[train].std()
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return Images(
        ImageTensors(images[train], labels[train]), ImageTensors(images[held_out], labels[held_out]), size, 1, 10
    )


def _digits_table() -> Array:
    """Return the digits as bytes (1797, 65): 64 pixels from 0 to 16, then the label."""
    bunch: Any = require("sklearn.datasets", "scikit-learn", "image").load_digits()
    return np.concatenate([bunch.data, bunch.target[:, None]], axis=1).astype(np.uint8)


def image_folder(root: Path, size: int) -> Images:
    """List the user's images: `root/CLASS/*`, or `root/train/CLASS/*` with `root/val/CLASS/*` or `root/test/CLASS/*`.

    Without a second split, a fifth of the images of each class is held out.

    Raises:
        DataError: the folder is missing or has no images, or a class is held out but not trained.
        WorkloadError: Pillow is not installed.
    """
    require("PIL.Image", "pillow", "image")
    if not root.is_dir():
        raise DataError(f"data={root}: there is no such folder")
    top = root / "train" if (root / "train").is_dir() else root
    classes = [folder.name for folder in _folders(top)]
    files = _labelled(top, classes)
    if not files:
        raise DataError(f"data={root}: no images in it; they must lie in one sub-folder per class")
    held_out_folder = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    if top == root or held_out_folder is None:
        train, held_out = stratified_split([label for _, label in files])
        splits = [files[i] for i in train], [files[i] for i in held_out]
    else:
        splits = files, _labelled(held_out_folder, classes)
    if not splits[1]:
        raise DataError(f"data={root}: too few images to hold some out; two per class are the least")
    make = partial(ImageFiles, size=size)
    return Images(make(splits[0]), make(splits[1]), size, 3, len(classes))


def _folders(top: Path) -> list[Path]:
    return sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))


def _labelled(top: Path, classes: list[str]) -> list[tuple[Path, int]]:
    files = []
    for folder in _folders(top):
        if folder.name not in classes:
            raise DataError(
                f"{folder}: class {folder.name!r} has no images to train on; known are {', '.join(classes)}"
            )
        visible = (path for path in folder.rglob("*") if not path.name.startswith("."))
        found = (path for path in visible if path.suffix.lower() in _SUFFIXES)
        for path in sorted(found):
            check_regular(path, DataError)
            files.append((path, classes.index(folder.name)))
    return files
