"""Batch norm over replicas equals torch's own over the whole batch; here the replicas are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.operators.batch_norm import batch_norm


class Ranks:
    """Stands in for a process group of threads: what each gives comes to all, in the order of the ranks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._local = threading.local()
        self._barrier = threading.Barrier(count)
        self._given: list[Tensor] = [torch.empty(0)] * count

    def size(self) -> int:
        return self.count

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self._given[self._local.rank] = tensor.clone()
        self._barrier.wait()
        everybody = list(self._given)
        self._barrier.wait()
        return everybody

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def work(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def as_group(ranks: Ranks) -> dist.ProcessGroup:
    """Ranks of threads with the interface that `batch_norm` needs of a group."""
    return cast("dist.ProcessGroup", ranks)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    group = Ranks(3)

    def all_gather(parts: list[Tensor], tensor: Tensor, group: Ranks) -> None:
        for part, given in zip(parts, group.exchange(tensor), strict=True):
            part.copy_(given)

    def all_reduce(tensor: Tensor, group: Ranks) -> None:
        tensor.copy_(torch.stack(group.exchange(tensor)).sum(0))

    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return group


def ready(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.clone().requires_grad_(True)


def torch_own(x: Tensor, weight: Tensor | None, bias: Tensor | None, gradient: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(True)
    mean, var = torch.zeros(x.size(1), dtype=x.dtype), torch.ones(x.size(1), dtype=x.dtype)
    weight, bias = ready(weight), ready(bias)
    output = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
    grads = torch.autograd.grad(output, [x, *(p for p in (weight, bias) if p is not None)], gradient)
    return {
        "output": output.detach(),
        "mean": mean,
        "var": var,
        "x": grads[0],
        "parameters": torch.stack(grads[1:] or [x]),
    }


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 5), (9, 4, 3, 2)])
def test_equals_torch_over_the_whole_batch(ranks: Ranks, shape: tuple[int, ...], affine: bool) -> None:
    """Uneven shares, and statistics far from zero, which a plain sum of squares would lose."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 0.1 + 1e4
    weight, bias = (torch.randn(2, 4, dtype=torch.float64)) if affine else (None, None)
    gradient = torch.randn(shape, dtype=torch.float64)
    expected = torch_own(x, weight, bias, gradient)
    shares = [slice(0, 4), slice(4, 7), slice(7, 9)]

    def replica(rank: int) -> dict[str, Tensor]:
        part = x[shares[rank]].clone().requires_grad_(True)
        own = ready(weight), ready(bias)
        mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        output = batch_norm(part, *own, mean, var, 0.3, 1e-5, as_group(ranks))
        wanted = [part, *(p for p in own if p is not None)]
        grads = torch.autograd.grad(output, wanted, gradient[shares[rank]])
        return {
            "output": output.detach(),
            "mean": mean,
            "var": var,
            "x": grads[0],
            "parameters": torch.stack(grads[1:] or [x]),
        }

    results = ranks.run(replica)
    for name in ("output", "x"):
        torch.testing.assert_close(torch.cat([r[name] for r in results]), expected[name], rtol=1e-7, atol=1e-7)
    for name in ("mean", "var"):
        assert all(torch.equal(result[name], results[0][name]) for result in results)
        torch.testing.assert_close(results[0][name], expected[name])
    if affine:
        torch.testing.assert_close(sum(r["parameters"] for r in results), expected["parameters"], rtol=1e-6, atol=1e-6)


def test_replica_that_does_not_count_changes_nothing(ranks: Ranks) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    gradient = torch.randn(4, 3, dtype=torch.float64)
    expected = torch_own(x, None, None, gradient)
    shares = [x[:2], x[2:], torch.full((1, 3), 100.0, dtype=torch.float64)]
    gradients = [gradient[:2], gradient[2:], torch.zeros(1, 3, dtype=torch.float64)]

    def replica(rank: int) -> list[Tensor]:
        part = shares[rank].clone().requires_grad_(True)
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        output = batch_norm(part, None, None, mean, var, 0.3, 1e-5, as_group(ranks), counted=rank < 2)
        (by_x,) = torch.autograd.grad(output, part, gradients[rank])
        return [output.detach(), by_x, mean, var]

    results = ranks.run(replica)
    torch.testing.assert_close(torch.cat([results[0][0], results[1][0]]), expected["output"])
    torch.testing.assert_close(torch.cat([results[0][1], results[1][1]]), expected["x"])
    assert bool((results[2][1] == 0).all())
    for result in results:
        torch.testing.assert_close(result[2], expected["mean"])
        torch.testing.assert_close(result[3], expected["var"])


def test_nobody_counts(ranks: Ranks) -> None:
    """A row of a last small batch in which no replica has a sample leaves the running statistics alone."""

    def replica(_: int) -> list[Tensor]:
        mean, var = torch.full((3,), 2.0), torch.full((3,), 5.0)
        output = batch_norm(torch.randn(1, 3), None, None, mean, var, 0.3, 1e-5, as_group(ranks), counted=False)
        assert bool(output.isfinite().all())
        return [mean, var]

    for mean, var in ranks.run(replica):
        assert mean.tolist() == [2.0] * 3
        assert var.tolist() == [5.0] * 3


def test_alone_and_in_half_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 5)
    mean, var = torch.zeros(4), torch.ones(4)
    weight, bias = torch.rand(4), torch.rand(4)
    expected = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training=True)
    torch.testing.assert_close(batch_norm(x, weight, bias, None, None, 0.1, 1e-5, None), expected)
    half = x.bfloat16().requires_grad_(True)
    output = batch_norm(half, weight, bias, mean, var, 0.1, 1e-5, None)
    output.float().square().sum().backward()  # type: ignore[no-untyped-call]
    assert half.grad is not None
    assert output.dtype == half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
