"""Medical segmentation: a 3-D U-Net finds grey and white matter in a brain volume, or labels the user's own volumes.

The parameters, for --set:
    data: folder with `imagesTr/` and `labelsTr/`, or `images/` and `labels/`, of NIfTI volumes; None means the MNI152
        brain with grey and white matter.
    patch: side of the cubes that the volumes are cut into, in voxels.
    channels: features of the first level of the U-Net; each further level has twice as many.
    levels: resolutions of the U-Net.
    norm: `instance` or `batch`.
    dropout: share of channels dropped in training.
    batch_size: samples per step over all workers.
    learning_rate: largest learning rate, reached after the warm-up.
    weight_decay: AdamW's weight decay of kernels.
    schedule_steps: steps over which the learning rate rises and falls, and the default length of a training.
    clip_norm: largest norm of the gradient; None means no clipping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.checks import check_at_most, check_divides, check_positive, check_share
from shardwise.workload.recipes.datasets.volumes import mni_brain, volume_folder
from shardwise.workload.recipes.models.unet import UNet3d
from shardwise.workload.recipes.training import adamw, epochs_of, warmup_cosine
from shardwise.workload.workload import Evaluation, Workload


def medical(
    data: Path | None = None,
    patch: int = 24,
    channels: int = 8,
    levels: int = 3,
    norm: Literal["instance", "batch"] = "instance",
    dropout: float = 0.0,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-3,
    schedule_steps: int = 100,
    clip_norm: float | None = 1.0,
) -> Workload:
    """Build a U-Net that classifies every voxel, scored by the mean Dice coefficient on held-out patches."""
    check_positive(channels=channels, levels=levels, batch_size=batch_size)
    check_positive(learning_rate=learning_rate, schedule_steps=schedule_steps)
    check_share(dropout=dropout)
    check_at_most(16, levels=levels)
    check_divides("patch", patch, 2 ** (levels - 1), f"{2 ** (levels - 1)}, for levels={levels} halve it")
    if patch < 2**levels:
        raise WorkloadError(f"patch={patch}: levels={levels} leave a single voxel of it; use patch={2**levels} or more")
    if norm not in ("instance", "batch"):
        raise WorkloadError(f"norm={norm}: must be instance or batch")
    volumes = volume_folder(data, patch) if data else mni_brain(patch)
    inputs, classes = volumes.channels, volumes.classes
    return Workload(
        name="medical",
        model=lambda: UNet3d(
            inputs=inputs, classes=classes, channels=channels, levels=levels, norm=norm, dropout=dropout
        ),
        dataset=volumes.train,
        inputs=lambda batch: batch["image"],
        loss=segmentation_loss,
        optimizer=adamw(learning_rate, weight_decay),
        batch_size=batch_size,
        schedule=warmup_cosine(schedule_steps),
        evaluation=Evaluation(dataset=volumes.held_out, metric="dice", measure=dice),
        clip_norm=clip_norm,
        epochs=epochs_of(schedule_steps, volumes.train, batch_size),
    )


def segmentation_loss(output: Tensor, batch: Any) -> Tensor:
    """Return the cross entropy plus one minus the soft Dice coefficient, as a mean over samples.

    Because it is a mean over samples, it does not depend on how they are batched.

    Args:
        output: logits (B, classes, D, D, D).
        batch: mapping with `label`, (B, D, D, D).
    """
    label = batch["label"]
    overlap, total = _overlap(output.softmax(dim=1), label)
    soft_dice = (2 * overlap + 1) / (total + 1)  # smoothed: a class absent from both scores 1
    return F.cross_entropy(output, label) + 1 - soft_dice.mean()


def dice(output: Tensor, batch: Any) -> Tensor:
    """Return the Dice coefficient, averaged over the classes present or predicted in each sample, then over samples."""
    predicted = _one_hot(output.argmax(dim=1), output.size(1))
    overlap, total = _overlap(predicted, batch["label"])
    there = (total > 0).float()
    by_sample = (2 * overlap / total.clamp(min=1) * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
    # a sample without any class that is predicted as such is perfect
    return torch.where(there.sum(dim=1) > 0, by_sample, torch.ones_like(by_sample)).mean()


def _overlap(predicted: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Count the voxels in both, and the sum of the voxels in each; both (B, classes - 1), without background."""
    target = _one_hot(label, predicted.size(1))
    predicted, target = predicted[:, 1:].flatten(2), target[:, 1:].flatten(2)
    return (predicted * target).sum(dim=2), (predicted + target).sum(dim=2)


def _one_hot(label: Tensor, classes: int) -> Tensor:
    """Convert labels (B, ...) to float32 (B, classes, ...)."""
    return F.one_hot(label, classes).movedim(-1, 1).float()
