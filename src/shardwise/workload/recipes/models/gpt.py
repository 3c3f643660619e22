"""A decoder-only language model: pre-norm blocks with RMS norm, rotary attention and SwiGLU (Touvron et al. 2023).

Shapes: B samples, T tokens, C hidden size, H heads, D = C / H.
Keys and values may have fewer heads than queries (Ainslie et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary position embedding: it rotates pairs of features by an angle that grows with position (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: int, positions: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(positions).float(), frequencies)  # (positions, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, H, T, D); the shape is unchanged."""
        cos, sin = self.cos[: x.size(2)].to(x.dtype), self.sin[: x.size(2)].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CausalAttention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, sequence: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.dropout = dropout
        self.sizes = [hidden, kv_heads * (hidden // heads), kv_heads * (hidden // heads)]
        self.qkv = nn.Linear(hidden, sum(self.sizes), bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.rotary = Rotary(hidden // heads, sequence)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within (B, T, C); the shape is unchanged."""
        B, T, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).split(self.sizes, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.kv_heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, C // self.heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        grouped = self.kv_heads != self.heads
        q, k = self.rotary(q), self.rotary(k)
        v = v.contiguous()  # a part of the projection would keep all of it until the backward pass
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        out: Tensor = self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return out


class SwiGLU(nn.Module):
    """A gated two-layer perceptron (Shazeer 2020)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the perceptron to (B, T, C); the shape is unchanged."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class DecoderBlock(nn.Module):
    """Attention, then the perceptron, each after a norm and added to the residual stream."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int, sequence: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden)
        self.attention = CausalAttention(hidden, heads, kv_heads, sequence, dropout)
        self.norm2 = nn.RMSNorm(hidden)
        self.mlp = SwiGLU(hidden, inner)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to (B, T, C); the shape is unchanged."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class GPT(nn.Module):
    """Decoder that predicts the next token at every position.

    Args:
        vocabulary: number of tokens.
        sequence: longest input in tokens.
        layers: transformer blocks.
        hidden: features per token (C), an even multiple of `heads`.
        heads: attention heads (H).
        kv_heads: heads of keys and values, which divide `heads`; None means as many as `heads`.
        inner: width of the perceptrons; None means `inner_width(hidden)`.
        dropout: share of activations dropped in training.
        tied: whether the output layer shares the weight of the token embedding.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        sequence: int,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        inner: int | None = None,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.dropout = nn.Dropout(dropout)
        sizes = (hidden, heads, kv_heads or heads, inner or inner_width(hidden))
        self.blocks = nn.ModuleList([DecoderBlock(*sizes, sequence, dropout) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                # keeps the residual stream's variance constant over depth (GPT-2, Radford et al. 2019)
                nn.init.normal_(weight, std=0.02 * (2 * layers) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to logits (B, T, vocabulary)."""
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def inner_width(hidden: int) -> int:
    """Return the width at which a gated perceptron has the parameters of a plain one of width 4 `hidden`.

    The width is rounded up to a multiple of 32.
    """
    return -(-8 * hidden // 3 // 32) * 32


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
