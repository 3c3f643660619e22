"""Random numbers that a model draws itself (stochastic depth, noise), independent of which worker draws them.

They come from the same keyed bits as dropout, see `parallel.operators.dropout`: those of an element depend on the
seed, the step, the call in the model, the sample and the place within the sample. So replicas, microbatches and shards
draw what one process draws, and a recomputed block draws the same again.

    uniform      b bits / 2^b, with as many bits as the dtype has digits
    bernoulli    uniform < p
    normal       sqrt(2) erfinv(2u - 1), the inverse of the normal distribution, with u in the middle of its interval
    exponential  -log(1 - u) / lambda, its inverse likewise
    integers     low + floor(u (high - low))

Calls with a generator of their own, and `multinomial`, `randperm` and others, are left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.engine import Position
from shardwise.parallel.operators.dropout import DropoutReplacements, by_sample, draw_bits
from shardwise.parallel.tensor.compute_rules import KEYED, draws_keyed

_DIGITS = {torch.float16: 11, torch.bfloat16: 8}
"""Binary digits of the dtypes that have fewer than the 24 of float32."""


class _Asked(NamedTuple):
    """Random numbers that a call asks for: the tensor to fill, the distribution, and its two parameters."""

    tensor: Tensor
    distribution: Callable[[Tensor, torch.dtype, Any, Any], Tensor]
    first: Any
    second: Any = None


def _uniform(bits: Tensor, dtype: torch.dtype, low: float, high: float) -> Tensor:
    return _fractions(bits, dtype) * (high - low) + low


def _bernoulli(bits: Tensor, dtype: torch.dtype, probability: Tensor | float, _: Any) -> Tensor:
    return _fractions(bits, torch.float32) < probability


def _normal(bits: Tensor, dtype: torch.dtype, mean: float, std: float) -> Tensor:
    return torch.erfinv(2 * _middles(bits, dtype) - 1) * (math.sqrt(2) * std) + mean


def _exponential(bits: Tensor, dtype: torch.dtype, rate: float, _: Any) -> Tensor:
    return -torch.log1p(-_middles(bits, dtype)) / rate


def _integers(bits: Tensor, dtype: torch.dtype, low: int, high: int) -> Tensor:
    return torch.floor(_fractions(bits, torch.float64) * (high - low)) + low


def _fractions(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in [0, 1) from random 32-bit integers."""
    if dtype == torch.float64:
        return (bits.to(torch.float64) + 2.0**31) / 2.0**32
    digits = _DIGITS.get(dtype, 24)
    return (bits >> 32 - digits).bitwise_and_((1 << digits) - 1).to(torch.float32) / (1 << digits)


def _middles(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in (0, 1), the middles of 2^24 intervals, or of 2^32 in float64."""
    wide = dtype == torch.float64
    return _fractions(bits, torch.float64 if wide else torch.float32) + 2.0 ** (-33 if wide else -25)


def _rand(*args: Any, **kwargs: Any) -> _Asked:
    return _Asked(torch.empty(*args, **kwargs), _uniform, 0.0, 1.0)


def _randn(*args: Any, **kwargs: Any) -> _Asked:
    return _Asked(torch.empty(*args, **kwargs), _normal, 0.0, 1.0)


def _rand_like(input: Tensor, **kwargs: Any) -> _Asked:  # noqa: A002
    return _Asked(torch.empty_like(input, **kwargs), _uniform, 0.0, 1.0)


def _randn_like(input: Tensor, **kwargs: Any) -> _Asked:  # noqa: A002
    return _Asked(torch.empty_like(input, **kwargs), _normal, 0.0, 1.0)


def _randint(*args: Any, **kwargs: Any) -> _Asked:
    low, high, size = _bounds(args, kwargs, "size")
    return _Asked(torch.empty(size, **{"dtype": torch.int64, **_given(kwargs)}), _integers, low, high)


def _randint_like(input: Tensor, *args: Any, **kwargs: Any) -> _Asked:  # noqa: A002
    low, high, _ = _bounds((*args, None), kwargs, "")
    return _Asked(torch.empty_like(input, **kwargs), _integers, low, high)


def _bounds(args: tuple[Any, ...], kwargs: dict[str, Any], last: str) -> tuple[int, int, Any]:
    """Return low, high and the last argument of `randint([low], high, last)`; takes them out of `kwargs`."""
    left = list(args)
    end = kwargs.pop(last) if last in kwargs else left.pop()
    high = kwargs.pop("high") if "high" in kwargs else left.pop()
    low = kwargs.pop("low") if "low" in kwargs else (left.pop() if left else 0)
    return low, high, end


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}


def _bernoulli_of(input: Tensor, p: float | None = None) -> _Asked:  # noqa: A002
    return _Asked(torch.empty_like(input), _bernoulli, input.detach() if p is None else p)


def _bernoulli_in(input: Tensor, p: Any = 0.5) -> _Asked:  # noqa: A002
    return _Asked(input, _bernoulli, p)


def _uniform_in(input: Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> _Asked:  # noqa: A002
    return _Asked(input, _uniform, kwargs.get("from", low), kwargs.get("to", high))


def _normal_in(input: Tensor, mean: float = 0.0, std: float = 1.0) -> _Asked:  # noqa: A002
    return _Asked(input, _normal, mean, std)


def _exponential_in(input: Tensor, lambd: float = 1.0) -> _Asked:  # noqa: A002
    return _Asked(input, _exponential, lambd)


_READ: dict[str, Callable[..., _Asked]] = {
    "rand": _rand,
    "randn": _randn,
    "rand_like": _rand_like,
    "randn_like": _randn_like,
    "randint": _randint,
    "randint_like": _randint_like,
    "bernoulli": _bernoulli_of,
    "bernoulli_": _bernoulli_in,
    "uniform_": _uniform_in,
    "normal_": _normal_in,
    "exponential_": _exponential_in,
}
"""Name of torch's function -> what a call of it asks for. Arguments are those of torch's documentation."""


@torch.no_grad()
def draw(position: Position, site: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what torch's function `name` returns for these arguments, with keyed numbers.

    Args:
        position: seed, step and samples of the microbatch.
        site: index of the drawing call in the model's forward pass.
        name: one of KEYED.
        args: positional arguments; those that end in `_` fill and return the first.
        kwargs: keyword arguments.
    """
    given = {key: value for key, value in kwargs.items() if key not in ("generator", "out")}
    asked = _READ[name](*args, **given)
    tensor = asked.tensor
    bits = by_sample(draw_bits, position, site, tensor.shape, tensor.device)
    tensor.copy_(asked.distribution(bits, tensor.dtype, asked.first, asked.second))
    return tensor


def replacements(dropout: DropoutReplacements) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Map torch's functions to ones that draw keyed numbers at the next site of `dropout`."""

    def drawn(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        through = bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
        if not draws_keyed(name, kwargs, through=through):
            output: Tensor = original(*args, **kwargs)
            return output
        site, dropout.site = dropout.site, dropout.site + 1
        return draw(dropout.position, site, name, args, kwargs)

    def gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
        """Compute `torch.nn.functional.gumbel_softmax` as torch does; it is a function around `exponential_`."""
        noise = drawn("exponential_", Tensor.exponential_, torch.empty_like(logits).detach())
        soft = ((logits - noise.log()) / tau).softmax(dim)
        if not hard:
            return soft
        chosen = torch.zeros_like(logits).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        return chosen - soft.detach() + soft

    originals = [(name, getattr(place, name, None)) for name in KEYED for place in (torch, Tensor)]
    found: dict[Callable[..., Any], Callable[..., Any]] = {
        original: partial(drawn, name, original) for name, original in originals if original is not None
    }
    return {**found, F.gumbel_softmax: gumbel_softmax}
