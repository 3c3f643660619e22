"""Embedding and cross entropy cut over workers, which are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.vocab_parallel import cross_entropy, embedding, local_index


class Threads:
    """`ranks` workers that add their tensors up; `run(function)` calls it with the exchange of each."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks)
        self._tensors: list[Tensor] = [torch.empty(0)] * ranks

    def run(self, function: Callable[[Exchange], Any]) -> list[Any]:
        results: list[Any] = [None] * self.ranks

        def work(rank: int) -> None:
            try:
                results[rank] = function(self.exchange(rank))
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self._barrier.broken
        return results

    def exchange(self, rank: int) -> Exchange:
        exchange = Exchange(None, rank, self.ranks)

        def summed(x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
            self._tensors[rank] = x
            self._barrier.wait()
            together = torch.stack(self._tensors)
            self._barrier.wait()
            return together.amax(0) if op == dist.ReduceOp.MAX else together.sum(0)

        exchange.summed = summed  # type: ignore[method-assign]
        return exchange


SPANS = [(12,), (6, 6), (6, 12)]


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_index_is_on_one_worker(spans: tuple[int, ...], ranks: int) -> None:
    index = torch.arange(sum(spans))
    found = torch.stack([local_index(Exchange(None, rank, ranks), spans, index) for rank in range(ranks)])
    assert (found >= 0).sum(0).tolist() == [1] * len(index)
    for rank in range(ranks):
        here = Exchange(None, rank, ranks).cut(index, 0, spans)
        assert found[rank][here].tolist() == list(range(len(here)))


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("padding", [-1, 3])
def test_embedding(spans: tuple[int, ...], padding: int) -> None:
    words = sum(spans)
    table = torch.randn(words, 5, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, words, (3, 4))
    index[0, 0] = 3
    expected = F.embedding(index, table, padding if padding >= 0 else None)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]

    def work(exchange: Exchange) -> tuple[Tensor, Tensor]:
        part = exchange.cut(table.detach(), 0, spans).clone().requires_grad_()
        summand = embedding(exchange, part, index, padding, spans)
        # rows of others are zero: the squares add up too
        summand.square().sum().backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        return summand.detach(), part.grad

    results = Threads(2).run(work)
    torch.testing.assert_close(sum(summand for summand, _ in results), expected.detach())
    assert table.grad is not None
    for rank, (_, gradient) in enumerate(results):
        torch.testing.assert_close(gradient, Exchange(None, rank, 2).cut(table.grad, 0, spans))


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 3, 2), ()])
def test_cross_entropy(spans: tuple[int, ...], smoothing: float, reduction: str, shape: tuple[int, ...]) -> None:
    classes, ranks = sum(spans), 3 if spans == (6, 12) else 2
    dim = 1 if shape else 0
    logits = torch.randn(*shape[:1], classes, *shape[1:], dtype=torch.float64) * 5 + 300  # must not overflow
    target = torch.randint(0, classes, shape)
    if shape:
        target[0] = -100
    logits.requires_grad_()
    expected = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    weights = torch.rand_like(expected)
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    number = ("none", "mean", "sum").index(reduction)

    def work(exchange: Exchange) -> tuple[Tensor, Tensor]:
        part = exchange.cut(logits.detach(), dim, spans).clone().requires_grad_()
        loss = cross_entropy(exchange, part, target, spans, number, -100, smoothing)
        (loss * weights).sum().backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        return loss.detach(), part.grad

    assert logits.grad is not None
    for rank, (loss, gradient) in enumerate(Threads(ranks).run(work)):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, Exchange(None, rank, ranks).cut(logits.grad, dim, spans))


def test_cross_entropy_of_nothing_is_no_number() -> None:
    target = torch.full((4,), -100)
    results = Threads(2).run(lambda e: cross_entropy(e, torch.randn(4, 3), target, (6,), 1, -100, 0.0))
    assert all(loss.isnan() for loss in results)
    assert F.cross_entropy(torch.randn(4, 6), target).isnan()
