"""A decoder-only language model: pre-norm blocks with RMS norm, rotary attention and SwiGLU (Touvron et al. 2023).

Shapes: B samples, T tokens, C hidden size, H heads, D = C / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotates pairs of features by an angle that grows with the position (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: int, positions: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(positions).float(), frequencies)  # (positions, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, D)."""
        cos, sin = self.cos[: x.size(2)].to(x.dtype), self.sin[: x.size(2)].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, hidden: int, heads: int, sequence: int, dropout: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.rotary = Rotary(hidden // heads, sequence)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).split(self.hidden, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return out


class SwiGLU(nn.Module):
    """A gated two-layer perceptron (Shazeer 2020)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = -(-8 * hidden // 3 // 32) * 32  # 8/3 keeps the parameters of a plain one with 4
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Attention, then the perceptron, each after a norm and added to the residual stream."""

    def __init__(self, hidden: int, heads: int, sequence: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads, sequence, dropout)
        self.norm2 = nn.RMSNorm(hidden)
        self.mlp = SwiGLU(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class GPT(nn.Module):
    """Predicts the next token at every place.

    Args:
        vocabulary: number of tokens.
        sequence: longest input in tokens.
        layers: transformer blocks.
        hidden: features per token (C), an even multiple of `heads`.
        heads: attention heads (H).
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
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(hidden, heads, sequence, dropout) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                # keeps the residual stream's variance over depth (GPT-2, Radford et al. 2019)
                nn.init.normal_(weight, std=0.02 * (2 * layers) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocabulary)."""
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
