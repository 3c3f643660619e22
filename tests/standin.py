"""A program that holds tensors and computes nothing: what checkpoints need of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.state.layout import Layout, TensorPiece

Split = Callable[[str, tuple[int, ...]], tuple[Layout, bool] | None]
"""(name, global shape) -> (layout, whether this worker writes it); None: not held here."""


def whole(name: str, shape: tuple[int, ...]) -> tuple[Layout, bool]:
    return Layout.whole(shape), True


class AdamW:
    """Named like torch's, which takes seconds to import."""


class SGD:
    """See AdamW."""


class StandIn:
    """`model` and `optimizer` are full tensors by name; each worker keeps its part as `split` says."""

    def __init__(
        self,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor] | None = None,
        split: Split = whole,
        *,
        steps: int = 0,
        kind: type = AdamW,
    ) -> None:
        self.steps = steps
        self.split = split
        self.held: dict[str, TensorPiece] = {}
        self.engine: Any = SimpleNamespace(aliases={})
        self.optimizer: Any = kind()
        full = {f"model/{k}": v for k, v in model.items()} | {f"optimizer/{k}": v for k, v in (optimizer or {}).items()}
        for name, tensor in full.items():
            self._hold(name, tensor)

    def _hold(self, name: str, full: Tensor) -> TensorPiece | None:
        held = self.split(name, tuple(full.shape))
        if held is None:
            return None
        layout, writes = held
        self.held[name] = TensorPiece(name, layout.cut(full), layout, writes)
        return self.held[name]

    def pieces(self) -> list[TensorPiece]:
        return list(self.held.values())

    def saved_pieces(self) -> list[TensorPiece]:
        return self.pieces()

    def replica_in(self, state: Mapping[str, Any]) -> int | None:
        return None

    def optimizer_piece(
        self, parameter: str, state: str, global_shape: Sequence[int], dtype: torch.dtype
    ) -> TensorPiece | None:
        name = f"optimizer/{parameter}/{state}"
        return self.held.get(name) or self._hold(name, torch.zeros(tuple(global_shape), dtype=dtype))

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def locals(self) -> dict[str, Tensor]:
        return {name: piece.local for name, piece in self.held.items()}

    def fill(self, value: float) -> None:
        for piece in self.held.values():
            piece.local.fill_(value)


def adam_like(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(model, optimizer state): a fused projection, a vector, a scalar buffer, several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    model = {
        "attention.qkv.weight": torch.randn(24, 6, generator=generator),
        "attention.out.weight": torch.randn(6, 8, generator=generator).bfloat16(),
        "norm.bias": torch.randn(7, generator=generator, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(3 + seed),
        "mask": torch.rand(5, 3, generator=generator) > 0.5,
        "odd": torch.randint(-9, 9, (3,), generator=generator, dtype=torch.int8),
    }
    optimizer = {
        "attention.qkv.weight/exp_avg": torch.randn(24, 6, generator=generator),
        "attention.qkv.weight/step": torch.tensor(4.0 + seed),
        "norm.bias/exp_avg": torch.randn(7, generator=generator, dtype=torch.float64),
        "norm.bias/step": torch.tensor(4.0 + seed),
    }
    return model, optimizer
