"""A 3-D U-Net (Cicek et al. 2016) with the details of nnU-Net (Isensee et al. 2021): instance norm, leaky ReLU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
    "batch": nn.BatchNorm3d,
}


def _double_conv(inputs: int, outputs: int, norm: str, dropout: float) -> nn.Sequential:
    """Build two 3x3x3 convolutions, each with a norm and a leaky ReLU: (B, inputs, ...) -> (B, outputs, ...)."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        _NORMS[norm](outputs),
        nn.LeakyReLU(0.01),
        nn.Dropout3d(dropout),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        _NORMS[norm](outputs),
        nn.LeakyReLU(0.01),
    )


class UNet3d(nn.Module):
    """U-Net that classifies every voxel of a patch.

    Args:
        inputs: channels of the image.
        classes: number of labels, the background included.
        channels: features of the first level; each further level has twice as many and half the side.
        levels: number of resolutions; the side of a patch must be divisible by 2 ** (levels - 1).
        norm: `instance` or `batch`.
        dropout: share of channels dropped in training.
    """

    def __init__(
        self, *, inputs: int, classes: int, channels: int, levels: int, norm: str = "instance", dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(levels)]
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(
            [_double_conv(a, b, norm, dropout) for a, b in [(inputs, channels), *pairs]],
        )
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ModuleList([nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in reversed(pairs)])
        self.merge = nn.ModuleList([_double_conv(2 * a, a, norm, dropout) for a, _ in reversed(pairs)])
        self.head = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map a patch (B, inputs, D, D, D) to logits (B, classes, D, D, D)."""
        skips = []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.down[-1](x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((skips.pop(), up(x)), dim=1))
        logits: Tensor = self.head(x)
        return logits
