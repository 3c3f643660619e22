"""Sizes of compressed gradients: by hand, and by what the codecs make."""

from __future__ import annotations

import pytest
import torch

from shardwise.options import Compression
from shardwise.parallel.data.compression.codecs import CODECS
from shardwise.parallel.data.reducer import Flat
from shardwise.splitting.compression import (
    BLOCK,
    code_bytes,
    is_factored,
    part_elements,
    scattered_messages,
    whole_messages,
)

SHAPES = ((100, 64), (64,), (4, 6))
ELEMENTS = 100 * 64 + 64 + 24


def of(text: str) -> Compression:
    return Compression.parse("compress", text)


def test_messages_of_whole_gradients() -> None:
    assert whole_messages(of("powersgd:2"), SHAPES, 4) == (
        ("all_reduce", 4 * (64 + 24 + 2 * 100)),
        ("all_reduce", 4 * 2 * 64),
    )
    assert whole_messages(of("powersgd:2"), SHAPES[1:], 4) == (("all_reduce", 4 * (64 + 24)),)
    assert whole_messages(of("topk:0.01"), SHAPES, 4) == (("all_gather", 4 * 65 * 8),)
    part = 7 * BLOCK  # 6488 / 4 = 1622 elements, in whole blocks
    assert whole_messages(of("int8"), SHAPES, 4) == tuple(
        (each, 4 * (part + 7 * 4)) for each in ("all_to_all", "all_gather")
    )
    assert whole_messages(of("bf16"), SHAPES, 4)[0] == ("all_to_all", 2 * ELEMENTS)


def test_messages_of_scattered_gradients() -> None:
    shapes = ((10, 64), (3,))  # 3 and 1 rows on each of 4 workers
    assert scattered_messages(of("powersgd:1"), shapes, 4) == (
        ("all_reduce", 4 * 10),
        ("all_reduce", 4 * 64),
        ("reduce_scatter", 4 * 4),
    )
    assert scattered_messages(of("topk:0.1"), shapes, 4) == (("all_to_all", 4 * 20 * 8),)  # of 193 elements each
    assert scattered_messages(of("sign"), shapes, 4) == (("all_to_all", 4 * (BLOCK // 8 + 4)),)


def test_a_matrix_is_factored_where_that_halves_it() -> None:
    assert is_factored((64, 64), 8)
    assert not is_factored((64, 64), 16)
    assert not is_factored((4096,), 1)
    assert is_factored((64, 3, 8, 8), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "error"), [("bf16", 0.004), ("int8", 0.02), ("fp8", 0.05), ("sign", 0.7)])
def test_codecs(kind: str, error: float, dtype: torch.dtype) -> None:
    values = torch.randn(3, 2 * BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[1, :BLOCK] = 0
    code = CODECS[kind].encode(values)
    assert code.shape == (3, code_bytes(of(kind), 2 * BLOCK))
    found = CODECS[kind].decode(code, dtype)
    assert found.dtype == dtype
    assert float((found - values).norm() / values.norm()) < error
    assert not found[1, :BLOCK].abs().max() > 1e-20
    assert bool((found[0] * values[0] >= 0).all())
    assert CODECS[kind].decode(CODECS[kind].encode(values * torch.nan), dtype).isnan().any()


def test_parts_are_whole_blocks() -> None:
    assert part_elements(of("int8"), 1000, 3) == 2 * BLOCK
    assert part_elements(of("bf16"), 1000, 3) == 334


@pytest.mark.parametrize("ranks", [0, 3])
def test_flat_gradients_are_split_and_joined(ranks: int) -> None:
    what = Flat(("a", "b", "c"), ((5, 2), (7,), (1, 3)), ranks)
    given = {name: torch.randn(shape) for name, shape in zip(what.names, what.shapes, strict=True)}
    flat = what.join(given, torch.empty(0))
    found = what.split(flat)
    assert all(torch.equal(found[name], each) for name, each in given.items())
    if ranks:
        rows = flat.view(3, -1)[1]
        assert torch.equal(rows[:4], given["a"][2:4].reshape(-1))
        assert torch.equal(rows[4:7], given["b"][3:6])
        assert float(rows[7:].abs().max()) == 0  # all of c is with the first worker
