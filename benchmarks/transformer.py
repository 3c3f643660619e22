"""The model that overhead and scaling are measured on: a plain causal transformer, and the workload that trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise import Workload


@dataclass(frozen=True)
class Size:
    layers: int = 4
    hidden: int = 192
    heads: int = 6
    sequence: int = 128
    vocabulary: int = 512
    batch: int = 16


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_size = hidden // heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:  # (samples, tokens, hidden)
        samples, tokens, _ = x.shape
        # the number of heads is left to the shape, as hand-written tensor parallelism needs it
        query, key, value = (
            layer(x).view(samples, tokens, -1, self.head_size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(samples, tokens, -1))
        return output


class Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(x)))
        return output


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = Mlp(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class Transformer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList([Block(size.hidden, size.heads) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:  # (samples, tokens) -> (samples, tokens, vocabulary)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(self.norm(x))
        return output


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def transformer_workload(size: Size) -> Workload:
    """Next-token prediction on four batches of random tokens: the measurement does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size.vocabulary, (4 * size.batch, size.sequence + 1), generator=generator)
    return Workload(
        name="transformer",
        model=lambda: Transformer(size),
        dataset=TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()),
        inputs=lambda batch: batch[0],
        loss=lambda logits, batch: token_loss(logits, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        batch_size=size.batch,
    )
