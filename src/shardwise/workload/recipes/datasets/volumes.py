"""Segmented volumes cut into patches: the MNI152 brain that ships with nilearn, or the user's folder of NIfTI files.

Forms of a user's `data`, in nnU-Net's convention or with plain names:

    imagesTr/ labelsTr/ [imagesTs/ labelsTs/]    case_0000.nii.gz (one file per channel: 0000, 0001, ...), case.nii.gz
    images/ labels/                              case.nii.gz in both
    train/ and val/ or test/                     each with one of the pairs of folders above

Without a second split, a fifth of the volumes is held out. If there is a single volume, the middle slab along its
second axis (front to back in the usual orientation) is held out, and training patches do not reach into it. Left and
right cannot be two splits: the MNI brain is symmetric, so one half reveals the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import DataError
from shardwise.files import check_regular
from shardwise.workload.recipes.datasets.cache import Array, LazyArray, cached, fingerprint
from shardwise.workload.recipes.datasets.nifti import open_nifti
from shardwise.workload.recipes.datasets.splits import split_names
from shardwise.workload.recipes.packages import folder_of, require

_NIFTI = (".nii.gz", ".nii")
_PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))
_HELD_OUT = ("val", "valid", "validation", "test")
_NOT_EMPTY = 0.25
"""Least share of a patch's voxels above the volume's darkest value: patches of air have nothing to learn from."""


class LabelledVolume:
    """One volume with its labels, converted once and then memory-mapped.

    Attributes:
        name: common name of its files.
        key: fingerprint of its files.
        image: float32 (channels, X, Y, Z), each channel with mean 0 and variance 1 over the voxels that are not empty.
        label: uint8 (X, Y, Z).
        shape: (X, Y, Z).
    """

    def __init__(self, name: str, images: Sequence[Path], labels: Sequence[Path], *, probabilities: bool) -> None:
        self.name = name
        self.key = fingerprint([*images, *labels])
        self.image = LazyArray(partial(cached, "volume", [self.key], partial(_read_image, images)))
        read_label = partial(_label_of_probabilities if probabilities else _read_label, labels)
        self.label = LazyArray(partial(cached, "labels", [self.key], read_label))
        self.shape: tuple[int, ...] = self.image.array.shape[1:]
        if self.label.array.shape != self.shape:
            raise DataError(f"{labels[0]} has shape {self.label.array.shape}, its image {self.shape}: they must agree")


@dataclass(frozen=True)
class Region:
    """Part of a case: voxels `first` to before `last` along the second axis, and all along the other two."""

    case: LabelledVolume
    first: int
    last: int

    def corners(self, size: int, stride: int) -> Array:
        """Return the lowest corners (patches, 3) of the patches in this region that are not mostly empty."""
        key = (self.case.key, self.first, self.last, size, stride)
        return cached("patches", key, partial(self._corners, size, stride))

    def _corners(self, size: int, stride: int) -> Array:
        image = self.case.image.array
        filled = (image > image.min(axis=(1, 2, 3), keepdims=True)).any(axis=0)
        bounds = [(0, self.case.shape[0]), (self.first, self.last), (0, self.case.shape[2])]
        grid = itertools.product(*(_starts(first, last, size, stride) for first, last in bounds))
        kept = [corner for corner in grid if filled[_box(corner, size)].mean() >= _NOT_EMPTY]
        return np.array(kept, dtype=np.int32).reshape(-1, 3)


class Patches(Dataset[dict[str, Tensor]]):
    """Cubic patches of regions.

    Samples: `image`, float32 (channels, size, size, size); `label`, int64 (size, size, size).

    Raises:
        DataError: the regions have no patch of that size that is not mostly empty.
    """

    def __init__(self, regions: Sequence[Region], size: int, stride: int) -> None:
        self.regions = regions
        self.size = size
        corners = [region.corners(size, stride) for region in regions]
        self.places = [(number, tuple(map(int, c))) for number, found in enumerate(corners) for c in found]
        if not self.places:
            shapes = ", ".join(sorted({str(region.case.shape) for region in regions}))
            raise DataError(f"patch={size}: no such patch in volumes of shape {shapes} is filled; use a smaller one")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, corner = self.places[index]
        case, box = self.regions[number].case, _box(corner, self.size)
        image = torch.from_numpy(np.array(case.image.array[:, box[0], box[1], box[2]]))
        return {"image": image, "label": torch.from_numpy(case.label.array[box].astype(np.int64))}


@dataclass(frozen=True)
class Volumes:
    """Training and held-out split of a segmentation task; `classes` includes the background, 0."""

    train: Patches
    held_out: Patches
    channels: int
    classes: int


def mni_brain(patch: int) -> Volumes:
    """Load the MNI152 template (197 x 233 x 189 voxels of 1 mm) with labels 1 grey matter, 2 white matter, 0 the rest.

    Raises:
        WorkloadError: nilearn or nibabel is not installed.
        DataError: this nilearn has no template, or the patch does not fit.
    """
    require("nibabel", "nibabel", "medical")
    folder = folder_of("nilearn", "nilearn", "medical") / "datasets" / "data"  # not imported: that takes seconds
    t1, grey, white = (folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm"))
    for path in (t1, grey, white):
        if not path.is_file():
            raise DataError(f"this version of nilearn has no {path.name}: install nilearn 0.10 or newer")
    return _slabs(LabelledVolume("mni152", [t1], [grey, white], probabilities=True), patch, classes=3)


def volume_folder(root: Path, patch: int) -> Volumes:
    """Load the user's volumes, see the module's docstring.

    Raises:
        WorkloadError: nibabel is not installed.
        DataError: there is no such folder or no pair of image and label, or files cannot be read or do not match.
    """
    require("nibabel", "nibabel", "medical")
    if not root.is_dir():
        raise DataError(f"data={root}: there is no such folder")
    train, held_out = _split_cases(root)
    cases = [*train, *held_out]
    channels = {case.image.array.shape[0] for case in cases}
    if len(channels) > 1:
        raise DataError(f"data={root}: volumes have different numbers of channels: {sorted(channels)}")
    classes = 1 + max(map(_largest_label, cases))
    if classes < 2:
        raise DataError(f"data={root}: its labels are all 0, there is nothing to segment")
    if not held_out:
        return _slabs(train[0], patch, classes)
    splits = [[Region(case, 0, case.shape[1]) for case in part] for part in (train, held_out)]
    return _volumes(splits[0], splits[1], patch, classes)


def _slabs(case: LabelledVolume, patch: int, classes: int) -> Volumes:
    """Split one volume by holding out a middle slab, about a fifth of it in whole patches."""
    length = case.shape[1]
    width = max(1, round(0.2 * length / patch)) * patch
    first = (length - width) // 2
    last = first + width
    train = [Region(case, 0, first), Region(case, last, length)]
    return _volumes(train, [Region(case, first, last)], patch, classes)


def _volumes(train: list[Region], held_out: list[Region], patch: int, classes: int) -> Volumes:
    """Cut regions into patches; training patches overlap by half, held-out ones only to fit in the last."""
    channels = train[0].case.image.array.shape[0]
    return Volumes(Patches(train, patch, max(1, patch // 2)), Patches(held_out, patch, patch), channels, classes)


def _split_cases(root: Path) -> tuple[list[LabelledVolume], list[LabelledVolume]]:
    held_out_folder = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    if (root / "train").is_dir() and held_out_folder is not None:
        return _cases(root / "train", *_pair(root / "train")), _cases(held_out_folder, *_pair(held_out_folder))
    cases = _cases(root, *_pair(root))
    if (root / "imagesTs").is_dir() and (root / "labelsTs").is_dir():
        return cases, _cases(root, "imagesTs", "labelsTs")
    if len(cases) == 1:
        return cases, []
    by_name = {case.name: case for case in cases}
    train, held_out = split_names(list(by_name), share=0.2)
    return [by_name[name] for name in train], [by_name[name] for name in held_out]


def _pair(root: Path) -> tuple[str, str]:
    for images, labels in _PAIRS:
        if (root / images).is_dir() and (root / labels).is_dir():
            return images, labels
    raise DataError(f"data={root}: has neither imagesTr/ and labelsTr/ nor images/ and labels/ in it")


def _cases(root: Path, images: str, labels: str) -> list[LabelledVolume]:
    found = {_stem(path): path for path in _nifti(root / labels)}
    if not found:
        raise DataError(f"{root / labels}: no NIfTI files (.nii, .nii.gz) in it")
    pictures = list(_nifti(root / images))
    cases = []
    for name, label in found.items():
        own = [p for p in pictures if _stem(p) == name] or [p for p in pictures if _is_channel(_stem(p), name)]
        if not own:
            raise DataError(f"{label} has no image: {root / images} must hold {name}.nii.gz or {name}_0000.nii.gz")
        cases.append(LabelledVolume(name, own, [label], probabilities=False))
    return cases


def _nifti(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_NIFTI) and not path.name.startswith("."):
            check_regular(path, DataError)
            yield path


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _is_channel(stem: str, case: str) -> bool:
    """Return whether `stem` is `case` followed by nnU-Net's channel number, an underscore and four digits."""
    suffix = stem[len(case) :]
    return stem.startswith(case) and len(suffix) == 5 and suffix[0] == "_" and suffix[1:].isdigit()


def _read(path: Path) -> Array:
    """Return the voxels of a NIfTI file as float32. Raises DataError if it cannot be read."""
    try:
        return np.asarray(open_nifti(path).dataobj, dtype=np.float32)
    except DataError:
        raise
    except Exception as error:  # nibabel's formats raise many kinds of errors
        raise DataError(f"{path} cannot be read as NIfTI: {' '.join(str(error).split())}") from error


def _read_image(paths: Sequence[Path]) -> Array:
    """Read an image (channels, X, Y, Z) from one file per channel, or from one file with the channels last."""
    volumes = [_read(path) for path in paths]
    if len({volume.shape for volume in volumes}) > 1:
        raise DataError(f"{paths[0]} and the other channels of it have different shapes")
    image = np.moveaxis(volumes[0], -1, 0) if volumes[0].ndim == 4 and len(volumes) == 1 else np.stack(volumes)
    if image.ndim != 4:
        raise DataError(f"{paths[0]} has shape {volumes[0].shape}: a volume has three dimensions")
    return np.stack([_normalised(channel) for channel in image])


def _normalised(volume: Array) -> Array:
    """Scale a channel to mean 0 and variance 1 over the voxels that are not empty."""
    filled = volume[volume > volume.min()]
    if not filled.size:
        return np.zeros_like(volume)
    return np.asarray((volume - filled.mean()) / max(float(filled.std()), 1e-6), dtype=np.float32)


def _read_label(paths: Sequence[Path]) -> Array:
    label = _read(paths[0])
    if label.min() < 0 or label.max() > 255 or (label != np.round(label)).any():
        raise DataError(f"{paths[0]}: labels must be whole numbers from 0 to 255")
    return label.astype(np.uint8)


def _label_of_probabilities(paths: Sequence[Path]) -> Array:
    """Convert one probability map per class to labels: the likeliest class if above half of its maximum, else 0."""
    maps = np.stack([volume / volume.max() for volume in map(_read, paths)])
    return np.where(maps.max(axis=0) > 0.5, maps.argmax(axis=0) + 1, 0).astype(np.uint8)


def _largest_label(case: LabelledVolume) -> int:
    def largest() -> Array:
        return np.array([case.label.array.max()])

    return int(cached("largest", [case.key], largest)[0])


def _starts(first: int, last: int, size: int, stride: int) -> list[int]:
    """Return the starts of patches: every `stride` voxels, and one that ends at `last`. Empty if none fits."""
    if last - first < size:
        return []
    return sorted({*range(first, last - size + 1, stride), last - size})


def _box(corner: Sequence[int], size: int) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start in corner)
