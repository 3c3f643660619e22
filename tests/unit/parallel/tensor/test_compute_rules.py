"""Tensor parallelism cuts a step along the expected dimensions, and workers talk as seldom as they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import cuts, exchanges, local
from torch import Tensor, nn

TOKENS = torch.randn(2, 6, 16)
POINTS = torch.randn(4, 16)
IMAGES = torch.randn(2, 4, 8, 8)


def feedforward() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


class Attention(nn.Module):
    """`spell` gets the output of one matrix, of `width` features, and says what queries, keys and values are."""

    def __init__(self, spell: Callable[[Tensor], tuple[Tensor, ...]], width: int = 48) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, width), nn.Linear(16, 16)
        self.spell = spell

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.spell(self.qkv(x))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.size(1) != q.size(1))
        output: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return output


def heads(x: Tensor) -> Tensor:
    return x.view(2, 6, -1, 4).transpose(1, 2)


def chunked(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads(part) for part in x.chunk(3, -1))


def unbound(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in x.view(2, 6, 3, 4, 4).unbind(2))


def permuted(x: Tensor) -> tuple[Tensor, ...]:
    qkv = x.view(2, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def sliced(x: Tensor) -> tuple[Tensor, ...]:
    return heads(x[..., :16]), heads(x[..., 16:32]), heads(x[..., 32:])


def interleaved(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in x.view(2, 6, 4, 3, 4).unbind(3))


def grouped(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads(part) for part in x.split([16, 8, 8], -1))  # type: ignore[no-untyped-call]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(16), Attention(chunked)
        self.norm2, self.feedforward = nn.LayerNorm(16), feedforward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.feedforward(self.norm2(x))
        return output


def test_columns_then_rows() -> None:
    graph, obstacles = local(feedforward, POINTS, 2)
    assert cuts(graph) == {"0.weight": (0, (32,)), "0.bias": (0, (32,)), "2.weight": (1, (32,)), "2.bias": None}
    assert exchanges(graph) == {"reduce": 1}  # the batch has no gradient: it need not be entered
    assert not obstacles


def test_pairs_of_layers_alternate() -> None:
    graph, _ = local(lambda: nn.Sequential(*(feedforward() for _ in range(3))), POINTS, 4)
    assert [cut[0] for name, cut in cuts(graph).items() if name.endswith("weight") and cut] == [0, 1] * 3
    assert exchanges(graph) == {"reduce": 3, "enter": 2}


def test_a_transformer_layer_has_two_all_reduces_each_way() -> None:
    graph, _ = local(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), Layer()), TOKENS, 2)
    # the two layers before it are a pair of their own
    assert exchanges(graph) == {"reduce": 3, "enter": 2}


def test_along_the_sequence_sums_are_scattered() -> None:
    graph, _ = local(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), Layer()), TOKENS, 2, sequence=True)
    found = exchanges(graph)
    assert (found["reduce_scatter"], found["gather_enter"]) == (3, 2)
    assert "reduce" not in found
    assert {"2.norm1.weight", "2.norm2.bias", "2.attention.out.bias"} <= graph.summed
    assert not any("qkv" in name or name.endswith("out.weight") for name in graph.summed)


@pytest.mark.parametrize("spell", [chunked, unbound, permuted, sliced])
def test_queries_keys_and_values_are_three_spans(spell: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    graph, obstacles = local(lambda: Attention(spell), TOKENS, 2)
    assert cuts(graph) == {
        "qkv.weight": (0, (16, 16, 16)), "qkv.bias": (0, (16, 16, 16)), "out.weight": (1, (16,)), "out.bias": None,
    }  # fmt: skip
    assert exchanges(graph) == {"reduce": 1}
    assert not obstacles


def test_interleaved_heads_need_no_spans() -> None:
    graph, _ = local(lambda: Attention(interleaved), TOKENS, 2)
    assert cuts(graph)["qkv.weight"] == (0, (48,))
    assert exchanges(graph) == {"reduce": 1}


def test_key_heads_are_cut_with_the_query_heads_that_share_them() -> None:
    graph, obstacles = local(lambda: Attention(grouped, 32), TOKENS, 2)
    assert cuts(graph)["qkv.weight"] == (0, (16, 8, 8))
    assert exchanges(graph) == {"reduce": 1}
    assert not obstacles


def test_fewer_key_heads_than_workers_are_copied() -> None:
    graph, obstacles = local(lambda: Attention(grouped, 32), TOKENS, 4)
    assert cuts(graph)["out.weight"] == (1, (16,))
    assert exchanges(graph)["gather"] == 2  # keys and values
    assert not obstacles


def test_heads_that_do_not_divide_are_an_obstacle() -> None:
    _, obstacles = local(lambda: Attention(chunked), TOKENS, 8)
    assert ("query heads", 4) in {(o.what, o.size) for o in obstacles}


def test_features_that_do_not_divide_are_named() -> None:
    graph, obstacles = local(lambda: nn.Linear(15, 9), torch.randn(4, 15), 2)
    assert cuts(graph) == {"weight": None, "bias": None}
    assert {o.what for o in obstacles} == {"weight (features 9 and 15)"}
    assert graph.reasons["weight"] == "tp=2 divides none of its features (9 and 15)"


def test_embedding_by_words_and_loss_by_classes() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 12, bias=False))

    def loss(output: Tensor, batch: tuple[Tensor]) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), batch[0].flatten())

    graph, _ = local(build, torch.randint(0, 12, (2, 6)), 2, loss=loss)
    assert cuts(graph) == {"0.weight": (0, (12,)), "1.weight": (0, (12,))}
    # the logits are not gathered
    assert exchanges(graph) == {"reduce": 1, "enter": 1}


def test_an_odd_vocabulary_is_cut_by_features() -> None:
    graph, _ = local(lambda: nn.Embedding(13, 16), torch.randint(0, 13, (2, 6)), 2)
    assert cuts(graph) == {"weight": (1, (16,))}


def test_convolutions_by_channels_with_what_is_between() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8),
            nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1),
        )  # fmt: skip

    graph, _ = local(build, IMAGES, 2)
    found = cuts(graph)
    assert found["0.weight"] == found["3.weight"] == (0, (8,))
    assert found["1.running_mean"] == found["2.weight"] == found["4.weight"] == (0, (8,))
    assert found["6.weight"] == (1, (8,))
    assert found["6.bias"] is None
    assert exchanges(graph) == {"reduce": 1}


def test_groups_that_cross_workers_are_gathered() -> None:
    graph, _ = local(lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1)), IMAGES, 2)
    assert exchanges(graph)["gather"] == 2  # before the groups, and for the loss


def test_joined_channels_keep_their_spans() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.last(torch.cat([self.left(x), self.right(x)], 1))
            return output

    graph, _ = local(Joined, IMAGES, 2)
    assert cuts(graph)["last.weight"] == (1, (8, 4))
    assert exchanges(graph) == {"reduce": 1}


def test_no_rule_means_computed_on_every_worker() -> None:
    graph, _ = local(lambda: nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 8)), POINTS, 2,
                     loss=lambda output, batch: output[0].mean())  # fmt: skip
    found = cuts(graph)
    assert found["0.weight"] == (0, (16,))
    assert not any(cut for name, cut in found.items() if name.startswith("1."))
    assert exchanges(graph) == {"gather": 1}
    assert any("lstm" in reason for reason in graph.reasons.values())


def test_one_worker_exchanges_nothing() -> None:
    graph, _ = local(Layer, TOKENS, 1)
    assert exchanges(graph) == {}
    assert not graph.summed
    assert not any(cuts(graph).values())


def test_a_mask_with_heads_is_cut_with_them() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.bias = nn.Linear(16, 48), nn.Parameter(torch.randn(1, 4, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = chunked(self.qkv(x))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)

    graph, _ = local(Biased, TOKENS, 2)
    assert cuts(graph)["bias"] == (1, (4,))
    assert exchanges(graph) == {"gather": 1}  # for the loss


def test_what_is_written_through_a_view_stays_whole() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh().clone()
            y[:, ::3].mul_(2)
            output: Tensor = y
            return output

    graph, _ = local(Written, POINTS, 2)
    names = [
        getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes if node.op != "placeholder"
    ]
    assert names.index("gather") < names.index("mul_.Tensor")


class Form(nn.Module):
    """A matrix that `use` turns into another form before it is used."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    ("shape", "use", "dim"),
    [
        ((32, 16), lambda x, w: x @ w.t(), 0),
        ((32, 16), lambda x, w: F.linear(x, w.to(torch.float64).float()), 0),
        ((16, 32), lambda x, w: F.linear(x, w.transpose(0, 1)), 1),
        ((1, 32, 16), lambda x, w: F.linear(x, w[0]), 1),
        ((32, 16), lambda x, w: torch.bmm(x, w.unsqueeze(0).transpose(1, 2).expand(2, -1, -1)), None),
        ((3, 32, 16), lambda x, w: torch.bmm(x, w[torch.arange(2)].transpose(1, 2)), 1),
        ((3, 16, 32), lambda x, w: torch.bmm(x, w.index_select(0, torch.arange(2))), 2),
        ((32, 16), lambda x, w: F.linear(x, 1.0 + w), 0),
        ((8, 16), lambda x, w: x + F.embedding(torch.zeros(2, 6, dtype=torch.long), w[torch.arange(8)]), 1),
    ],
    ids=[
        "transposed",
        "converted",
        "input first",
        "selected",
        "expanded",
        "indexed",
        "index_select",
        "shifted",
        "looked up",
    ],
)
def test_a_parameter_in_another_form_is_cut_by_its_use(shape: Any, use: Any, dim: int | None) -> None:
    graph, _ = local(lambda: Form(shape, use), TOKENS, 2)
    found = cuts(graph)["weight"]
    assert (None if found is None else found[0]) == dim
    if dim is None:
        assert graph.reasons["weight"]


def test_a_form_that_lacks_the_dimension_keeps_the_parameter_whole() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        first = w[0]  # one row, of a matrix that would be cut by rows
        return F.linear(x, w) + first.sum()

    graph, _ = local(lambda: Form((32, 16), twice), TOKENS, 2)
    assert cuts(graph)["weight"] is None


def test_experts_are_cut_within_each() -> None:
    def grouped(x: Tensor, w: Tensor) -> Tensor:
        ends = torch.tensor([5, 12], dtype=torch.int32)
        return torch._grouped_mm(x.flatten(0, 1).bfloat16(), w.bfloat16().transpose(1, 2), offs=ends).float()

    graph, _ = local(lambda: Form((2, 32, 16), grouped), TOKENS, 2)
    assert cuts(graph)["weight"] == (1, (32,))


def test_what_is_whole_has_a_reason_and_a_share() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 9))
    graph, _ = local(lambda: model, TOKENS, 2)
    uncut = {each.reason: each for each in graph.uncut(dict(model.named_parameters()))}
    assert set(uncut["layer_norm takes all of it"].names) == {"2.weight", "2.bias"}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert uncut["layer_norm takes all of it"].share == pytest.approx(32 / total)
    assert sum(each.share for each in uncut.values()) + graph.sharded_share(dict(model.named_parameters())) == 1
    assert "whole on all tp workers: layer_norm" in str(uncut["layer_norm takes all of it"])
