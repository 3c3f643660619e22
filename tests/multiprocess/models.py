"""Small plain models of many kinds, each as a workload in float64: what the tests of parallelism train.

They are ordinary PyTorch, spelled in the ways that people spell them: that is what is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from shardwise.workload.workload import Evaluation, Workload

WORDS, TOKENS, WIDTH, HEADS = 12, 6, 16, 4

EVALUATED = 16
"""Samples of an evaluation: whole batches, for each shape of a batch is traced anew."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Adam makes steps of gradients that are zero but for rounding (a bias before a normalisation)."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-5)


def accuracy(output: Tensor, batch: Any) -> Tensor:
    result: Tensor = (output.argmax(1) == batch[-1]).double().mean()
    return result


def classify(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[-1])


def make(model: Callable[[], nn.Module], dataset: Dataset[Any], **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "model",
        "model": lambda: model().double(),
        "dataset": dataset,
        "inputs": lambda batch: batch[0],
        "loss": classify,
        "optimizer": adam,
        "batch_size": 8,
        "seed": 3,
    }
    return Workload(**{**options, **changes})


# ---- attention, as it is spelled ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention with separate projections; others inherit and spell `project` or `mix` otherwise."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.size, self.dropout = heads, width // heads, dropout
        self.out = nn.Linear(width, width, bias=False)
        self.setup(width)

    def setup(self, width: int) -> None:
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        """(samples, tokens, heads * size) -> (samples, heads, tokens, size)."""
        return x.view(*x.shape[:2], -1, self.size).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(*self.project(x))
        output: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return output


class Fused(Attention):
    def setup(self, width: int) -> None:
        self.qkv = nn.Linear(width, 3 * width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.split(q), self.split(k), self.split(v)


class FusedSplit(Fused):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split(x.size(-1), dim=2)
        return self.split(q), self.split(k), self.split(v)


class FusedUnbind(Fused):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.size).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class FusedPermute(Fused):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]


class FusedSlices(Fused):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, width = self.qkv(x), x.size(-1)
        q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
        return self.split(q), self.split(k), self.split(v)


class Interleaved(Fused):
    """Query, key and value of each head are neighbours."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.heads, 3, self.size).unbind(3)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class InterleavedChunk(Fused):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.heads, 3 * self.size).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v


class Grouped(Attention):
    """Several query heads share a key head."""

    keys = 2

    def setup(self, width: int) -> None:
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, self.keys * self.size) for _ in range(2))

    def share(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.keys, dim=1)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return q, self.share(k), self.share(v)


class GroupedExpand(Grouped):
    def share(self, x: Tensor) -> Tensor:
        samples, keys, tokens, size = x.shape
        wider = x[:, :, None].expand(samples, keys, self.heads // self.keys, tokens, size)
        return wider.reshape(samples, self.heads, tokens, size)


class GroupedFlag(Grouped):
    def share(self, x: Tensor) -> Tensor:
        return x

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class GroupedFused(GroupedFlag):
    """One weight for queries, keys and values of different sizes."""

    def setup(self, width: int) -> None:
        self.qkv = nn.Linear(width, width + 2 * self.keys * self.size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.keys * self.size
        q, k, v = self.qkv(x).split([x.size(-1), size, size], dim=-1)
        return self.split(q), self.split(k), self.split(v)


class MultiQuery(Grouped):
    keys = 1


class MultiQueryFused(GroupedFlag):
    """Falcon's: one matrix for the query heads and one key head, multiplied as `x @ weight.T`."""

    keys = 1

    def setup(self, width: int) -> None:
        self.weight = nn.Parameter(torch.randn(width + 2 * self.size, width) * 0.2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (x @ self.weight.T).view(*x.shape[:2], -1, self.size)
        parts = heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]
        q, k, v = (part.transpose(1, 2) for part in parts)
        return q, k, v


class Manual(Attention):
    """Scores by hand, with dropout on the probabilities."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / self.size**0.5
        tokens = q.size(-2)
        hidden = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool, device=q.device), 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        return F.dropout(scores.softmax(-1), self.dropout, self.training) @ v


class Einsum(Attention):
    def setup(self, width: int) -> None:
        self.weight = nn.Parameter(torch.randn(3, width, self.heads, self.size) * 0.2)
        self.back = nn.Parameter(torch.randn(self.heads, self.size, width) * 0.2)
        del self.out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhs->bths", x, weight) for weight in self.weight)
        scores = torch.einsum("bths,buhs->bhtu", q, k).softmax(-1)
        return torch.einsum("bthv,hvd->btd", torch.einsum("bhtu,buhs->bths", scores, v), self.back)


class Rotary(Grouped):
    """Rotary positions, normalised queries and keys."""

    cos: Tensor
    sin: Tensor

    def setup(self, width: int) -> None:
        super().setup(width)
        self.norm_q, self.norm_k = nn.RMSNorm(self.size), nn.RMSNorm(self.size)
        steps = torch.arange(TOKENS)[:, None] / 100 ** (torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("cos", torch.cat([steps, steps], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([steps, steps], -1).sin(), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[: x.size(2)] + torch.cat([-second, first], -1) * self.sin[: x.size(2)]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = Attention.project(self, x)
        return self.turn(self.norm_q(q)), self.share(self.turn(self.norm_k(k))), self.share(v)


class RotaryComplex(Attention):
    """Rotary positions as turns of complex numbers."""

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.size(2))[:, None] * torch.tensor([0.1, 0.3], dtype=torch.float64)
        turned = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(3)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return self.turn(q), self.turn(k), v


class Biased(Attention):
    """A learned bias per head and distance."""

    distance: Tensor

    def setup(self, width: int) -> None:
        super().setup(width)
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, self.heads))
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1
        self.register_buffer("distance", distance)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.distance.view(-1)].view(TOKENS, TOKENS, self.heads).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, with the attention weights used too."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, *, weights: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.inner(x, x, x, need_weights=self.weights)
        output: Tensor = y if weights is None else y + weights.sum(1, keepdim=True).transpose(1, 2) * 0.1
        return output


# ---- language models ------------------------------------------------------------------------------------------------


class Feedforward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(x)))
        return output


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        output: Tensor = self.down(F.silu(gate) * up)
        return output


class Experts(nn.Module):
    """Every expert sees every token; a gate weighs them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.up = nn.Parameter(torch.randn(4, width, 2 * width) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 2 * width, width) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        hidden = torch.einsum("btd,edh->bteh", x, self.up).relu()
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.down, weights)


class Layer(nn.Module):
    def __init__(
        self, attention: nn.Module, feedforward: nn.Module, norm: Callable[[int], nn.Module], width: int = WIDTH
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), attention
        self.norm2, self.feedforward = norm(width), feedforward
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        output: Tensor = x + self.drop(self.feedforward(self.norm2(x)))
        return output


class Decoder(nn.Module):
    """A pre-norm language model."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = Attention,
        feedforward: Callable[[int], nn.Module] = Feedforward,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        *,
        layers: int = 2,
        words: int = WORDS,
        tied: bool = False,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, WIDTH, padding_idx=padding)
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH) * 0.1)
        self.layers = nn.ModuleList(Layer(attention(), feedforward(WIDTH), norm) for _ in range(layers))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[:, : tokens.size(1)]
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.head(self.norm(x))
        return output


def sentences(samples: int = 24, words: int = WORDS, tokens: int = TOKENS) -> TensorDataset:
    return TensorDataset(torch.randint(0, words, (samples, tokens + 1), generator=generator(5)))


def next_word(output: Tensor, batch: Any, **options: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[0][:, 1:].flatten(), **options)


def language(model: Callable[[], nn.Module] = Decoder, words: int = WORDS, **changes: Any) -> Workload:
    return make(
        model,
        sentences(words=words),
        **{"inputs": lambda batch: batch[0][:, :-1], "loss": next_word, **changes},
    )


def separate() -> Workload:
    held_out = Evaluation(
        dataset=sentences(EVALUATED),
        metric="right",
        measure=lambda output, batch: (output.argmax(-1) == batch[0][:, 1:]).double().mean(),
    )
    return language(evaluation=held_out, clip_norm=0.3)


def spelled(attention: Callable[[], nn.Module], **options: Any) -> Callable[[], Workload]:
    """A one-layer language model with another attention."""
    return lambda: language(lambda: Decoder(attention, layers=1, **options))


def tied() -> Workload:
    return language(
        lambda: Decoder(Fused, SwiGLU, nn.RMSNorm, tied=True),
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        clip_norm=0.3,
    )


def odd_vocabulary() -> Workload:
    return language(lambda: Decoder(layers=1, words=13, tied=True), words=13)


def smoothed() -> Workload:
    return language(
        lambda: Decoder(layers=1, padding=2),
        loss=lambda output, batch: next_word(output, batch, label_smoothing=0.1, ignore_index=2),
        weight=lambda batch: (batch[0][:, 1:] != 2).sum(),
    )


def classes_second() -> Workload:
    """The loss on (samples, classes, tokens), as a sum over what counts."""

    def loss(output: Tensor, batch: Any) -> Tensor:
        targets = batch[0][:, 1:]
        each = F.cross_entropy(output.transpose(1, 2), targets, reduction="none")
        counts = targets > 4
        result: Tensor = (each * counts).sum() / counts.sum()
        return result

    return language(lambda: Decoder(layers=1), loss=loss, weight=lambda batch: (batch[0][:, 1:] > 4).sum())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return output


class Encoder(nn.Module):
    """torch's own encoder layers."""

    def __init__(self, *, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.first = batch_first
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.first:
            output: Tensor = self.head(self.layers(x))
        else:
            output = self.head(self.layers(x.transpose(0, 1)).transpose(0, 1))
        return output


class Translator(nn.Module):
    """torch's encoder and decoder; the encoder's output goes to every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Transformer(WIDTH, HEADS, 1, 2, 24, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1), dtype=torch.float64)
        output: Tensor = self.head(
            self.inner(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        )
        return output


def translator() -> Workload:
    return language(Translator, inputs=lambda batch: (batch[0][:, :4], batch[0][:, :-1]))


# ---- vision ---------------------------------------------------------------------------------------------------------


def images(samples: int = 24, channels: int = 2, size: int = 8, dims: int = 2, classes: int = 4) -> TensorDataset:
    draw = generator(7)
    x = torch.randn(samples, channels, *(size,) * dims, generator=draw, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, classes, (samples,), generator=draw))


def vision(model: Callable[[], nn.Module], dims: int = 2, **changes: Any) -> Workload:
    held_out = Evaluation(dataset=images(EVALUATED, dims=dims), metric="accuracy", measure=accuracy)
    return make(model, images(dims=dims), **{"optimizer": sgd, "evaluation": held_out, **changes})


class Residual(nn.Module):
    def __init__(self, enter: int, leave: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(enter, leave, 3, padding=1, bias=False), nn.BatchNorm2d(leave)
        self.conv2, self.norm2 = nn.Conv2d(leave, leave, 3, padding=1, bias=False), nn.BatchNorm2d(leave)
        self.short = nn.Identity() if enter == leave else nn.Conv2d(enter, leave, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.short(x)
        output: Tensor = self.relu(y)
        return output


class Bottleneck(nn.Module):
    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width // 2, 1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=groups),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Depthwise(nn.Module):
    """Depthwise, squeeze and excitation, pointwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.norm = nn.BatchNorm2d(2 * width)
        self.squeeze, self.excite = nn.Conv2d(2 * width, 4, 1), nn.Conv2d(4, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.depth(F.hardswish(self.expand(x)))))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        output: Tensor = x + self.drop(self.project(y * torch.sigmoid(gate)))
        return output


class ConvNeXt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        output: Tensor = x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return output


class Head(nn.Sequential):
    def __init__(self, width: int, dims: int = 2) -> None:
        pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
        super().__init__(pool(1), nn.Flatten(), nn.Linear(width, 4))


def resnet() -> Workload:
    return vision(lambda: nn.Sequential(Residual(2, 8), nn.MaxPool2d(2), Residual(8, 8), Head(8)))


def bottlenecks() -> Workload:
    return vision(
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), Bottleneck(8), Bottleneck(8, 2), Bottleneck(8, 4), Head(8))
    )


def mobile() -> Workload:
    return vision(lambda: nn.Sequential(nn.Conv2d(2, 8, 2, 2), Depthwise(8), ConvNeXt(8), Depthwise(8), Head(8)))


class UNet(nn.Module):
    """Skip connections by `cat`, transposed convolutions, two kinds of normalisation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def block(enter: int, leave: int, norm: nn.Module) -> nn.Module:
            return nn.Sequential(nn.Conv3d(enter, leave, 3, padding=1), norm, nn.LeakyReLU(0.1, inplace=True))

        self.enter = block(1, width, nn.InstanceNorm3d(width, affine=True))
        self.down = block(width, 2 * width, nn.GroupNorm(4, 2 * width))
        self.bottom = block(2 * width, 4 * width, nn.GroupNorm(2, 4 * width))
        self.up1 = nn.ConvTranspose3d(4 * width, 2 * width, 2, 2)
        self.merge1 = block(4 * width, 2 * width, nn.GroupNorm(2, 2 * width))
        self.up2 = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.merge2 = block(2 * width, width, nn.InstanceNorm3d(width))
        self.head = nn.Conv3d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down(F.max_pool3d(first, 2))
        third = self.bottom(F.max_pool3d(second, 2))
        y = self.merge1(torch.cat([self.up1(third), second], 1))
        output: Tensor = self.head(self.merge2(torch.cat([self.up2(y), first], 1)))
        return output


def volumes(samples: int) -> TensorDataset:
    draw = generator(9)
    x = torch.randn(samples, 1, 4, 4, 4, generator=draw, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (samples, 4, 4, 4), generator=draw))


def dice(output: Tensor, batch: Any) -> Tensor:
    wanted = F.one_hot(batch[1], 3).movedim(-1, 1).to(output.dtype)
    found = output.softmax(1)
    overlap = (found * wanted).sum((2, 3, 4))
    score = 2 * overlap / (found.sum((2, 3, 4)) + wanted.sum((2, 3, 4)) + 1e-6)
    return F.cross_entropy(output, batch[1]) + 1 - score.mean()


def unet() -> Workload:
    held_out = Evaluation(dataset=volumes(EVALUATED), metric="accuracy", measure=accuracy)
    return make(UNet, volumes(16), loss=dice, optimizer=sgd, evaluation=held_out)


def signals() -> Workload:
    """1-D convolutions: dilated, strided, transposed, with and without normalisation."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(2, 8, 3, padding="same"),
            nn.BatchNorm1d(8, momentum=0.3),
            nn.PReLU(8),
            nn.Conv1d(8, 8, 3, padding=2, dilation=2),
            nn.Dropout1d(0.2),
            nn.Conv1d(8, 16, 2, stride=2),
            nn.GLU(1),
            nn.ConvTranspose1d(8, 4, 3, stride=2, output_padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(4),
        )

    def built() -> nn.Module:
        model = build()
        model(torch.zeros(2, 2, 8))
        return model

    return vision(built, dims=1)


# ---- the rest -------------------------------------------------------------------------------------------------------


def points(samples: int = 24, size: int = 6) -> TensorDataset:
    draw = generator(7)
    x = torch.randn(samples, size, generator=draw, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 4, (samples,), generator=draw))


def perceptron() -> Workload:
    """ReLU in place, frozen parameters, a parameter that is never used."""

    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(inplace=True),
            nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4),
        )  # fmt: skip
        model[3].weight.requires_grad_(False)
        model[7].bias.requires_grad_(False)
        return model

    return make(build, points(), clip_norm=0.5)


class Named(nn.Module):
    """Takes and gives dicts; its loss is a mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.never = nn.Linear(2, 2)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        hidden = self.left(x).tanh() * self.right(y).sigmoid()
        return {"value": self.out(hidden) * self.temperature, "hidden": (hidden, [hidden.sum()])}


class Pairs(Dataset[Any]):
    def __init__(self, samples: int) -> None:
        self.x = torch.randn(samples, 2, 6, generator=generator(3), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.x[index]
        return {"inputs": {"x": x, "y": y}, "target": (x * y)[:3]}


def regression() -> Workload:
    return make(
        Named,
        Pairs(24),
        inputs=lambda batch: batch["inputs"],
        loss=lambda output, batch: (
            F.mse_loss(output["value"], batch["target"]) + 1e-3 * output["hidden"][0].abs().mean()
        ),
    )


# ---- what models do now and then ------------------------------------------------------------------------------------


class Small(nn.Module):
    """Three linear layers; `compute` says what is done with them, `setup` adds to them."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], setup: Callable[[Any], None] | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.compute = compute
        if setup is not None:
            setup(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def small(
    compute: Callable[[Any, Tensor], Tensor], setup: Callable[[Any], None] | None = None, **changes: Any
) -> Callable[[], Workload]:
    return lambda: make(lambda: Small(compute, setup), points(), **changes)


def drawn(m: Any, x: Tensor) -> Tensor:
    """Stochastic depth as timm and transformers spell it, noise, random scales, and a choice by Gumbel noise."""
    if not m.training:
        output: Tensor = m.c(m.b(m.a(x)))
        return output
    depth = x.new_empty(len(x), 1).bernoulli_(0.7).div_(0.7)
    h = m.a(x) + m.b(m.a(x)).tanh() * depth
    h = h * (0.8 + torch.rand((len(x), 1), dtype=x.dtype, device=x.device)).floor() + 0.1 * torch.randn_like(h)
    h = h * torch.empty_like(h).uniform_(0.5, 1.5) + torch.randint(0, 3, h.shape, device=x.device) * 0.1
    h = h + torch.rand(5, dtype=x.dtype, device=x.device).mean()  # belongs to no sample
    result: Tensor = m.c(h) + F.gumbel_softmax(m.c(h.tanh()), tau=0.7)
    return result


def written_by_parts(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.a(x), m.b(m.a(x))], 1)
    y[:, :3] = 0.5
    y[:, 5:7].mul_(2)
    output: Tensor = m.c(y[:, :8] + y[:, 8:])
    return output


def written_by_steps(m: Any, x: Tensor) -> Tensor:
    y = m.a(x) * 1
    h = m.b(y.tanh())
    y[:, ::2].add_(h[:, ::2])
    output: Tensor = m.c(y)
    return output


def written_late(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).tanh() * 1
    z = y[:, 2:5]
    h = m.b(y * 1)
    z.mul_(2)
    output: Tensor = m.c(h + y)
    return output


def written_batch(m: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    output: Tensor = m.c(m.b(m.a(x)) + x.sum(1, keepdim=True))
    return output


def written_without_gradient(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh() * 1
    with torch.no_grad():
        h.mul_(0.5)
    output: Tensor = m.c(m.b(h))
    return output


def buffer(m: Any) -> None:
    m.register_buffer("seen", torch.zeros(8))
    m.register_buffer("calls", torch.zeros((), dtype=torch.long))


def updates_buffer(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if m.training:
        with torch.no_grad():
            m.seen.mul_(0.9).add_(h.mean(0) * 0.1)
        m.calls += 1
    output: Tensor = m.c(m.b(h - m.seen).tanh())
    return output


def assigns_buffer(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if m.training:
        m.seen = 0.9 * m.seen + 0.1 * h.detach().mean(0)
    output: Tensor = m.c(m.b(h - m.seen).tanh())
    return output


def low_rank(m: Any) -> None:
    m.b.requires_grad_(False)
    m.down, m.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


def adapted(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    output: Tensor = m.c(m.b(h) + m.up(m.down(h)))
    return output


def norm(kind: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def setup(m: Any) -> None:
        m.norm = kind()

    return setup


def parametrized(kind: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def setup(m: Any) -> None:
        m.b = kind(nn.Linear(8, 8))

    return setup


def parameters(m: Any) -> None:
    m.p, m.q, m.r = (nn.Parameter(torch.randn(*size)) for size in ((8, 8), (1, 8), (1,)))


def twin(m: Any) -> None:
    m.d = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    m.register_buffer("gain", torch.full((4,), 1.5))


def other_in_evaluation(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    y = m.c(m.b(h))
    output: Tensor = y + m.d(h) if m.training else y * m.gain
    return output


class Mixer(nn.Module):
    """Mixes tokens, then features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.features = Feedforward(TOKENS), Feedforward(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        output: Tensor = self.head(x + self.features(self.norm(x)))
        return output


class Shared(nn.Module):
    """One layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layer = Layer(Fused(), Feedforward(WIDTH), nn.LayerNorm)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = self.layer(x)
        output: Tensor = self.head(x)
        return output


class Scan(nn.Module):
    """A gated recurrence, written as a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.enter, self.gate, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        u, g = self.enter(x), self.gate(x).sigmoid()
        h, hidden = torch.zeros_like(u[:, 0]), []
        for t in range(x.size(1)):
            h = g[:, t] * h + (1 - g[:, t]) * u[:, t]
            hidden.append(h)
        output: Tensor = self.head(torch.stack(hidden, 1))
        return output


class FirstToken(nn.Module):
    """A learned token before the others, three kinds of embeddings, words picked by position."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.places = (nn.Embedding(n, WIDTH) for n in (WORDS, 2, TOKENS))
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layer = Layer(Attention(), Feedforward(WIDTH), nn.LayerNorm)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.size(1))) + self.kinds((tokens > 5).long())
        x = self.layer(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        last = x[torch.arange(len(tokens)), (tokens != 0).sum(1) - 1]
        output: Tensor = self.head(x[:, 1:] + x[:, :1] + last.unsqueeze(1))
        return output


SPELLINGS: dict[str, Callable[[], Workload]] = {
    "chunk": spelled(Fused),
    "split": spelled(FusedSplit),
    "unbind": spelled(FusedUnbind),
    "permute": spelled(FusedPermute),
    "slices": spelled(FusedSlices),
    "interleaved": spelled(Interleaved),
    "interleaved-chunk": spelled(InterleavedChunk),
    "grouped": spelled(partial(Grouped, heads=8)),
    "grouped-expand": spelled(partial(GroupedExpand, heads=8)),
    "grouped-flag": spelled(partial(GroupedFlag, heads=8)),
    "grouped-fused": spelled(partial(GroupedFused, heads=8)),
    "multi-query": spelled(MultiQuery),
    "multi-query-fused": spelled(MultiQueryFused),
    "manual": spelled(partial(Manual, dropout=0.1)),
    "attention-dropout": spelled(partial(Attention, dropout=0.1)),
    "einsum": spelled(Einsum),
    "rotary": spelled(Rotary, norm=nn.RMSNorm),
    "rotary-complex": spelled(RotaryComplex),
    "bias": spelled(Biased),
    "torch": spelled(TorchAttention),
    "torch-weights": spelled(partial(TorchAttention, weights=True)),
    "experts": spelled(Attention, feedforward=Experts),
    "swiglu": spelled(Attention, feedforward=SwiGLU),
}
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "separate": separate,
    "tied": tied,
    "odd-vocabulary": odd_vocabulary,
    "smoothed": smoothed,
    "classes-second": classes_second,
    "recurrent": lambda: language(Recurrent),
    "encoder": lambda: language(Encoder),
    "encoder-tokens-first": lambda: language(lambda: Encoder(batch_first=False, norm_first=True)),
    "translator": translator,
    "resnet": resnet,
    "bottlenecks": bottlenecks,
    "mobile": mobile,
    "unet": unet,
    "signals": signals,
    "perceptron": perceptron,
    "regression": regression,
}

ODDITIES: dict[str, Callable[[], Workload]] = {
    "drawn": small(drawn),
    "written-by-parts": small(written_by_parts),
    "written-by-steps": small(written_by_steps),
    "written-late": small(written_late),
    "written-batch": small(written_batch),
    "written-without-gradient": small(written_without_gradient),
    "updates-buffer": small(updates_buffer, buffer),
    "assigns-buffer": small(assigns_buffer, buffer),
    "low-rank": small(adapted, low_rank),
    "without-gradient": small(lambda m, x: m.c(m.b(m.a(x)).tanh() * m.a(x).detach())),
    "one-layer-norm": small(lambda m, x: m.c(m.norm(m.b(m.norm(m.a(x))))), norm(lambda: nn.LayerNorm(8))),
    "one-group-norm": small(lambda m, x: m.c(m.norm(m.b(m.norm(m.norm(m.a(x)))))), norm(lambda: nn.GroupNorm(4, 8))),
    "one-batch-norm": small(
        lambda m, x: m.c(m.b(m.norm(m.b(m.norm(m.a(x)))))), norm(lambda: nn.BatchNorm1d(8)), optimizer=sgd
    ),
    "weight-norm": small(lambda m, x: m.c(m.b(m.a(x).tanh())), parametrized(nn.utils.parametrizations.weight_norm)),
    "spectral-norm": small(lambda m, x: m.c(m.b(m.a(x).tanh())), parametrized(nn.utils.parametrizations.spectral_norm)),
    "transposed": small(lambda m, x: m.c(F.linear(m.b(m.a(x)).tanh(), m.b.weight.t()))),
    "parameters": small(lambda m, x: m.c(((m.a(x) @ m.p).tanh() @ m.p.T * m.q).sigmoid() * m.r), parameters),
    "picked": small(lambda m, x: m.c(F.normalize(m.b(m.a(x)).tanh()[:, [3, 1, 2, 0, 5, 4, 7, 6]].cumsum(1), dim=-1))),
    "moments": small(lambda m, x: m.c((m.b(m.a(x)) - m.a(x).mean(1, keepdim=True)) / m.a(x).std(1, keepdim=True))),
    "gram": small(lambda m, x: m.c((m.a(x)[:, :, None] * m.b(m.a(x))[:, None]).softmax(2).sum(1))),
    "penalty": small(
        lambda m, x: (m.c(m.b(m.a(x)).tanh()), m.b.weight.square().sum()),  # type: ignore[arg-type, return-value]
        loss=lambda output, batch: F.cross_entropy(output[0], batch[1]) + 0.1 * output[1],
    ),
    "other-in-evaluation": small(
        other_in_evaluation, twin, evaluation=Evaluation(dataset=points(EVALUATED), metric="accuracy", measure=accuracy)
    ),
    "mixer": lambda: language(Mixer),
    "shared": lambda: language(Shared),
    "scan": lambda: language(Scan),
    "first-token": lambda: language(FirstToken),
}


ALL = {**SPELLINGS, **WORKLOADS, **ODDITIES}


def first(name: str, samples: int) -> Workload:
    """A model with fewer samples: the last batch is a small one, in training and in evaluation."""
    workload = ALL[name]()
    held_out = [replace(each, dataset=Subset(each.dataset, range(EVALUATED - 5))) for each in workload.evaluations]
    return replace(workload, dataset=Subset(workload.dataset, range(samples)), evaluation=held_out or None)
