"""Image classification: a vision transformer or a residual network on handwritten digits, or the user's own images.

The parameters, for --set:
    model: `vit` or `resnet`.
    data: folder with one sub-folder of images per class; None means scikit-learn's 1,797 digits.
    image_size: side of the images in pixels; None means 8 for the digits, 64 for a folder.
    patch_size: side of the transformer's patches; None means an eighth of the image, but at least 2.
    layers: transformer blocks, or basic blocks of the residual network (3 or more).
    hidden: features per patch, or channels of the last stage.
    heads: attention heads of the transformer.
    dropout: share of activations dropped in training.
    batch_size: samples per step over all workers.
    learning_rate: largest learning rate, reached after the warm-up.
    weight_decay: AdamW's weight decay of matrices and kernels.
    schedule_epochs: epochs over which the learning rate rises and falls, and the default length of a training.
    clip_norm: largest norm of the gradient; None means no clipping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.checks import DEEPEST, check_at_most, check_divides, check_positive, check_share
from shardwise.workload.recipes.datasets.images import Images, digits, image_folder
from shardwise.workload.recipes.models.resnet import ResNet
from shardwise.workload.recipes.models.vit import ViT
from shardwise.workload.recipes.training import adamw, warmup_cosine
from shardwise.workload.workload import Evaluation, Workload


def image(
    model: Literal["vit", "resnet"] = "vit",
    data: Path | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    dropout: float = 0.0,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    schedule_epochs: int = 10,
    clip_norm: float | None = 1.0,
) -> Workload:
    """Build an image classifier, scored by its accuracy on held-out images."""
    size = (64 if data else 8) if image_size is None else image_size
    patch = max(2, size // 8) if patch_size is None else patch_size
    _check(model, size, patch, layers, hidden, heads)
    check_positive(batch_size=batch_size, learning_rate=learning_rate, schedule_epochs=schedule_epochs)
    check_share(dropout=dropout)
    images = image_folder(data, size) if data else digits(size)

    def build() -> nn.Module:
        if model == "resnet":
            return _resnet(images, layers, hidden, dropout)
        return _vit(images, patch, layers, hidden, heads, dropout)

    steps = schedule_epochs * -(-len(images.train) // batch_size)
    return Workload(
        name=f"image-{model}",
        model=build,
        dataset=images.train,
        inputs=lambda batch: batch["image"],
        loss=lambda output, batch: F.cross_entropy(output, batch["label"]),
        optimizer=adamw(learning_rate, weight_decay),
        batch_size=batch_size,
        schedule=warmup_cosine(steps),
        evaluation=Evaluation(dataset=images.held_out, metric="accuracy", measure=accuracy),
        clip_norm=clip_norm,
        epochs=schedule_epochs,
    )


def accuracy(output: Tensor, batch: Any) -> Tensor:
    """Return the share of samples whose largest logit is that of their label."""
    right: Tensor = output.argmax(dim=1) == batch["label"]
    return right.float().mean()


def _check(model: str, size: int, patch: int, layers: int, hidden: int, heads: int) -> None:
    if model not in ("vit", "resnet"):
        raise WorkloadError(f"model={model}: must be vit or resnet")
    check_positive(image_size=size, patch_size=patch, layers=layers, heads=heads)
    check_at_most(DEEPEST, image_size=size, layers=layers, heads=heads)
    check_divides("hidden", hidden, 4, "4, for the first layers have a quarter and a half of it")
    if model == "vit":
        check_divides("image_size", size, patch, f"patch_size={patch}")
        check_divides("hidden", hidden, heads, f"heads={heads}")
        return
    if layers < 3:
        raise WorkloadError(f"layers={layers}: a residual network needs 3 or more, for it has three stages")


def _vit(images: Images, patch: int, layers: int, hidden: int, heads: int, dropout: float) -> ViT:
    return ViT(
        image_size=images.size,
        patch_size=patch,
        channels=images.channels,
        classes=images.classes,
        layers=layers,
        hidden=hidden,
        heads=heads,
        dropout=dropout,
    )


def _resnet(images: Images, layers: int, hidden: int, dropout: float) -> ResNet:
    return ResNet(
        image_size=images.size,
        channels=images.channels,
        classes=images.classes,
        layers=layers,
        hidden=hidden,
        dropout=dropout,
    )
