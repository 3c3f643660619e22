"""Small optimizers of the kinds that people use: what each looks at to update an element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Kind(torch.optim.Optimizer):
    """An optimizer whose `change(parameter, gradient, state, group)` is what it subtracts."""

    def __init__(self, parameters: Any, lr: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in self.with_gradient():
            assert parameter.grad is not None
            parameter.sub_(group["lr"] * self.change(parameter, parameter.grad, self.state[parameter], group))

    def with_gradient(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            yield from ((group, parameter) for parameter in group["params"] if parameter.grad is not None)

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def _mean(state: dict[str, Any], name: str, value: Tensor, beta: float) -> Tensor:
    state[name] = state.get(name, torch.zeros_like(value)) * beta + value * (1 - beta)
    result: Tensor = state[name]
    return result


class Lion(Kind):
    """By element; smoothed, so that rounding cannot turn a sign."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return torch.tanh(10 * (0.1 * gradient + 0.9 * _mean(state, "momentum", gradient, 0.99)))


class Lamb(Kind):
    """Adam's change, as large as the parameter."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        first, second = _mean(state, "first", gradient, 0.9), _mean(state, "second", gradient.square(), 0.99)
        step = first / (second.sqrt() + 1e-4)
        result: Tensor = step * (parameter.norm() + 0.1) / (step.norm() + 1e-6)
        return result


class Lars(Kind):
    """The gradient, as large as the parameter."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return _mean(state, "momentum", gradient * (parameter.norm() + 0.1) / (gradient.norm() + 1e-6), 0.9)


class Factored(Kind):
    """Row and column moments of matrices, as Adafactor has them."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        square = gradient.square() + 1e-6
        if gradient.dim() < 2:
            return gradient / _mean(state, "second", square, 0.9).sqrt()
        row, column = (_mean(state, name, square.mean(dim), 0.9) for name, dim in (("row", -1), ("column", 0)))
        return gradient / (row.unsqueeze(-1) * column / column.mean(0)).sqrt()


class Shampoo(Kind):
    """A list of preconditioners, one for each dimension, and a count that is a Python number."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["count"] = state.get("count", 0) + 1
        sides = state.setdefault("sides", [torch.eye(size, dtype=gradient.dtype) for size in gradient.shape])
        result = gradient
        for dim, side in enumerate(sides):
            flat = gradient.movedim(dim, 0).reshape(side.shape[0], -1)
            side += flat @ flat.T
            values, vectors = torch.linalg.eigh(side)
            root = vectors @ (values ** (-1 / (2 * gradient.dim())))[:, None].mul(vectors.T)
            result = torch.tensordot(result, root, ([0], [0]))
        return result


class Soap(Kind):
    """Adam in a basis that is renewed now and then; None where a dimension has no basis."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if gradient.dim() != 2:
            return 0.1 * gradient
        count = state["count"] = state.get("count", -1) + 1
        state.setdefault("sums", [gradient.new_zeros(len(gradient), len(gradient)), None])[0].add_(
            gradient @ gradient.T
        )
        if count % 2 == 0:
            state["basis"] = (
                torch.linalg.qr(state["sums"][0] + torch.eye(len(gradient), dtype=gradient.dtype))[0],
                None,
            )
        if count == 0:
            return torch.zeros_like(parameter)
        basis = state["basis"][0]
        turned = basis.T @ gradient
        result: Tensor = basis @ (turned / (_mean(state, "second", turned.square(), 0.9).sqrt() + 1e-3))
        return result


class Prodigy(Kind):
    """One size of step for all parameters, from all of their gradients."""

    def __init__(self, parameters: Any, lr: float = 1.0, d: float = 1e-2) -> None:
        super().__init__(parameters, lr, d=d)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [parameter.grad for _, parameter in self.with_gradient() if parameter.grad is not None]
        total = sum(float(gradient.norm()) for gradient in gradients)
        for group in self.param_groups:
            group["d"] = 0.9 * group["d"] + 1e-3 * total
        super().step()

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        result: Tensor = group["d"] * gradient
        return result


class Noisy(Kind):
    """Gradient and noise."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient + 0.01 * torch.randn_like(gradient)


class Kept(Kind):
    """An object in its state."""

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["helper"] = torch.Generator()
        return gradient


class Counter(Kind):
    """A count that is an attribute, which no checkpoint knows of."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        super().step()

    def change(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / self.steps


def muon(parameters: Any) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for what is none."""
    parameters = list(parameters)
    return [
        torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.02),
        torch.optim.AdamW([p for p in parameters if p.dim() != 2], lr=1e-2, eps=1e-5),
    ]


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=1e-2)
