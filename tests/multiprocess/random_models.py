"""Random small modules: chains of the operations that models are made of, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import Attention, Fused, FusedPermute, Grouped, GroupedFused, Interleaved, Manual, make, points
from torch import Tensor, nn

from shardwise.workload.workload import Workload

TOKENS = 4
ATTENTIONS = (Attention, Fused, FusedPermute, Interleaved, Grouped, GroupedFused, Manual)
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.gelu, F.silu, torch.tanh, torch.sigmoid, torch.relu)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Around(nn.Module):
    """`join` of x and what a chain makes of it."""

    def __init__(self, inner: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.join = inner, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.inner(x))


class Weighed(nn.Module):
    """A parameter of the width, or of the tokens, or of all."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OverTokens(nn.Module):
    """A layer on (samples, width, tokens)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return output


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([F.silu(a) * b, a], -1)


def swap(x: Tensor) -> Tensor:
    third = x.size(-1) // 4
    a, b = x.split([third, x.size(-1) - third], -1)  # type: ignore[no-untyped-call]
    return torch.cat([b.flip(-1), a], -1)


def regroup(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 2, -1).transpose(-1, -2).reshape(x.shape)


def write(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 1::3].mul_(0.5)
    x[:, 0] += x[:, -1]
    return x


def centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) + x.amax(1, keepdim=True)


MOVES = (gate, swap, regroup, write, centre)


class Builder:
    """Draws the layers of one module."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def chain(self, width: int, length: int, depth: int) -> tuple[nn.Module, int]:
        layers = []
        for _ in range(length):
            layer, width = self.layer(width, depth)
            layers.append(layer)
        return nn.Sequential(*layers), width

    def layer(self, width: int, depth: int) -> tuple[nn.Module, int]:
        kinds = [
            "linear",
            "linear",
            "norm",
            "activation",
            "activation",
            "move",
            "attention",
            "weighed",
            "tokens",
            "drop",
        ]
        kinds += ["residual", "residual", "concat", "again"] if depth else []
        return getattr(self, self.draw.choice(kinds))(width, depth)  # type: ignore[no-any-return]

    def linear(self, width: int, _: int) -> tuple[nn.Module, int]:
        leave = self.draw.choice([8, 12, 16, 24, width])
        return nn.Linear(width, leave, bias=self.draw.random() < 0.7), leave

    def norm(self, width: int, _: int) -> tuple[nn.Module, int]:
        over = OverTokens(nn.GroupNorm(self.draw.choice([2, 4]), width))
        return self.draw.choice([nn.LayerNorm(width), nn.RMSNorm(width), over]), width

    def activation(self, width: int, _: int) -> tuple[nn.Module, int]:
        return Apply(self.draw.choice(ACTIVATIONS)), width

    def move(self, width: int, _: int) -> tuple[nn.Module, int]:
        return Apply(self.draw.choice(MOVES)), width

    def attention(self, width: int, _: int) -> tuple[nn.Module, int]:
        heads = self.draw.choice([2, 4])
        kind = self.draw.choice(ATTENTIONS)
        return kind(width, heads, 0.1), width

    def weighed(self, width: int, _: int) -> tuple[nn.Module, int]:
        return Weighed(self.draw.choice([(width,), (TOKENS, 1), (1,), (1, TOKENS, width)])), width

    def tokens(self, width: int, _: int) -> tuple[nn.Module, int]:
        leave = self.draw.choice([8, width])
        convolution = nn.Conv1d(width, leave, 3, padding=1)
        depthwise = nn.Conv1d(width, width, 3, padding=1, groups=width)
        inner, leave = self.draw.choice(
            [(convolution, leave), (depthwise, width), (nn.Linear(TOKENS, TOKENS), width), (nn.PReLU(width), width)]
        )
        return OverTokens(inner), leave

    def drop(self, width: int, _: int) -> tuple[nn.Module, int]:
        return nn.Dropout(0.2), width

    def residual(self, width: int, depth: int) -> tuple[nn.Module, int]:
        inner, leave = self.chain(width, self.draw.randint(1, 3), depth - 1)
        inner = inner if leave == width else nn.Sequential(inner, nn.Linear(leave, width))
        return Around(inner, torch.add), width

    def concat(self, width: int, depth: int) -> tuple[nn.Module, int]:
        inner, leave = self.chain(width, self.draw.randint(1, 2), depth - 1)
        joined = Around(inner, lambda x, y: torch.cat([x, y], -1))
        return nn.Sequential(joined, nn.Linear(width + leave, 16)), 16

    def again(self, width: int, depth: int) -> tuple[nn.Module, int]:
        """Call one stack of layers twice."""
        inner, leave = self.chain(width, self.draw.randint(1, 2), depth - 1)
        inner = inner if leave == width else nn.Sequential(inner, nn.Linear(leave, width))
        return nn.Sequential(inner, nn.Tanh(), inner), width


class RandomModel(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        builder = Builder(seed)
        self.enter = nn.Linear(6, TOKENS * 8)
        self.body, width = builder.chain(8, 6, 2)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(self.enter(x).view(-1, TOKENS, 8)).mean(1))
        return output


def random_workload(seed: int) -> Workload:
    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)  # type: ignore[arg-type]

    return make(lambda: RandomModel(seed), points(24), optimizer=sgd)
