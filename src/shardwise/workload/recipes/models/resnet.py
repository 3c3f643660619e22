"""A residual network (He et al. 2016) with batch norm and basic blocks, in its form for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, S, S) to (B, outputs, S / stride, S / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network that classifies square images.

    Its three stages have `hidden / 4`, `hidden / 2` and `hidden` channels; each halves the side of the one before.

    Args:
        image_size: side of an image in pixels; from 64 on, a strided stem first reduces it to a quarter.
        channels: channels of an image.
        classes: number of labels.
        layers: basic blocks over all stages, 3 or more.
        hidden: channels of the last stage, a multiple of 4.
        dropout: share of the last features dropped in training.
    """

    def __init__(
        self, *, image_size: int, channels: int, classes: int, layers: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = (hidden // 4, hidden // 2, hidden)
        self.stem = nn.Sequential(*_stem(channels, widths[0], large=image_size >= 64))
        blocks = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(layers // 3 + (stage < layers % 3)):
                blocks.append(BasicBlock(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, channels, image_size, image_size) to logits (B, classes)."""
        x = self.blocks(self.stem(images))
        logits: Tensor = self.head(self.dropout(self.pool(x).flatten(1)))
        return logits


def _stem(channels: int, width: int, *, large: bool) -> list[nn.Module]:
    if not large:
        return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    conv = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
