"""A vision transformer (Dosovitskiy et al. 2021) in the plain form of Beyer et al. 2022: pre-norm, averaged patches.

Two small convolutions come before the patches (Xiao et al. 2021): with few images they add a point of accuracy.
Queries, keys and values have no biases (ViT-22B, Dehghani et al. 2023): a bias of the keys has no effect.

Shapes: B samples, T patches, C hidden size, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within (B, T, C); the shape is unchanged."""
        B, T, C = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, T, C / H) each
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class EncoderBlock(nn.Module):
    """Attention, then a two-layer perceptron, each after a layer norm and added to the residual stream."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, dropout)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * hidden, hidden)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to (B, T, C); the shape is unchanged."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class ViT(nn.Module):
    """Vision transformer that classifies square images.

    Args:
        image_size: side of an image in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        channels: channels of an image.
        classes: number of labels.
        layers: transformer blocks.
        hidden: features per patch (C), a multiple of `heads` and of 4.
        heads: attention heads (H).
        dropout: share of activations dropped in training.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int,
        classes: int,
        layers: int,
        hidden: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = _patches(channels, hidden, patch_size)
        self.position = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, hidden))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([EncoderBlock(hidden, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.position, std=0.5)  # as large as the patches: positions matter from the start

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, channels, image_size, image_size) to logits (B, classes)."""
        x = self.embedding(images).flatten(2).transpose(1, 2)  # (B, T, C)
        x = self.dropout(x + self.position)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


def _patches(channels: int, hidden: int, patch_size: int) -> nn.Sequential:
    """Build the convolutions from pixels to patches: (B, channels, S, S) -> (B, C, S / patch_size, S / patch_size)."""
    stride = 2 if patch_size % 4 == 0 else 1  # for large patches, the cheap first layers do most of the downsampling
    last = patch_size // stride**2
    return nn.Sequential(
        nn.Conv2d(channels, hidden // 4, 3, stride=stride, padding=1),
        nn.GELU(),
        nn.Conv2d(hidden // 4, hidden // 2, 3, stride=stride, padding=1),
        nn.GELU(),
        nn.Conv2d(hidden // 2, hidden, last, stride=last),
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
