"""A plain module in bfloat16: which operations compute in which dtype, and where gradients add up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwise.errors import WorkloadError
from shardwise.workload.precision import Copies, calls_computing, check_kept, computing, for_gpu, kept_of, widened

BF16, FLOAT32 = torch.bfloat16, torch.float32


class Residual(nn.Module):
    """Positions as a parameter, a norm, a product, and a table of float32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.position = nn.Parameter(torch.randn(4, 8))
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(8))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        self.seen["residual"] = x.dtype
        x = x + self.inner(self.norm(x) * self.table)
        self.seen["after"] = x.dtype
        self.seen["told"] = self.position.dtype
        return x


def output_of(module: nn.Module, precision: str, x: Tensor, copies: Copies | None = None) -> Tensor:
    with computing(precision, module.parameters(), copies):
        output: Tensor = module(x)
    return output


def test_what_flows_between_layers_is_bfloat16() -> None:
    module, x = Residual(), torch.randn(4, 8)
    assert output_of(module, "bf16", x.to(BF16)).dtype == BF16
    assert module.seen == {"residual": BF16, "after": BF16, "told": BF16}
    assert output_of(module, "autocast", x).dtype == FLOAT32
    assert module.seen == {"residual": FLOAT32, "after": FLOAT32, "told": FLOAT32}
    assert output_of(module, "float32", x).dtype == FLOAT32


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_gradients_are_those_of_float32_within_rounding(precision: str) -> None:
    module, x = Residual(), torch.randn(4, 8)
    plain = copy.deepcopy(module)
    plain(x).square().mean().backward()
    copies = Copies()
    widened(output_of(module, precision, x, copies)).square().mean().backward()
    for (name, parameter), like in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert like.grad is not None
        assert parameter.grad.dtype == FLOAT32, name
        assert float((parameter.grad - like.grad).norm() / like.grad.norm()) < 0.02, name


def test_gradients_of_several_passes_add_up_in_float32() -> None:
    """A small gradient after a large one is lost in bfloat16, which has eight bits."""
    weight = nn.Parameter(torch.ones(1, 1))
    copies = Copies()
    for factor in (1.0, *[1e-3] * 20):
        with computing("bf16", [weight], copies):
            output = F.linear(torch.full((1, 1), factor), weight)
        torch.autograd.backward(output.float().sum())
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx(1.02, rel=1e-3)


def test_a_copy_is_made_once_until_it_is_forgotten() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    copies = Copies()
    first = copies.of(weight)
    assert copies.of(weight).data_ptr() == first.data_ptr()
    with torch.no_grad():
        weight.fill_(2.0)
    assert float(copies.of(weight).detach().sum()) == 4.0  # still the copy of before
    copies.forget()
    assert float(copies.of(weight).detach().sum()) == 8.0
    assert first.copied_from is weight  # type: ignore[attr-defined]


def test_parameters_are_changed_themselves() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with computing("bf16", [weight], Copies()), torch.no_grad():
        weight.add_(torch.ones(2))
        weight.data.add_(1.0)
        weight[0] = 5.0
        weight.__iadd__(1.0)
    assert weight.dtype == FLOAT32
    assert weight.tolist() == [6.0, 3.0]


def test_rows_of_a_table_are_scaled_in_the_parameter() -> None:
    """A lookup with `max_norm` changes the table, which training keeps."""
    table = nn.Parameter(torch.full((3, 4), 2.0))
    with computing("bf16", [table], Copies()):
        looked_up = F.embedding(torch.tensor([1]), table, max_norm=1.0)
    assert looked_up.dtype == BF16
    assert table.norm(dim=1).tolist() == pytest.approx([4.0, 1.0, 4.0])


def test_sparse_gradients_stay_sparse() -> None:
    table = nn.Embedding(5, 4, sparse=True)
    torch.autograd.backward(output_of(table, "bf16", torch.tensor([1, 3]), Copies()).float().sum())
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert table.weight.grad.dtype == FLOAT32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_a_model_that_recomputes_by_itself_recomputes_alike(precision: str, reentrant: bool) -> None:
    class Recomputed(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.inner, self.again = Residual(), again

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant) if self.again else self.inner(x)
            return output

    gradients = []
    for again in (True, False):
        module, x = Recomputed(again), torch.ones(4, 8, requires_grad=True)
        torch.autograd.backward(output_of(module, precision, x, Copies()).float().square().mean())
        gradients.append([p.grad for p in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        (lambda x, w: F.cross_entropy(x @ w, torch.zeros(3, dtype=torch.long)), FLOAT32),
        (lambda x, w: torch.zeros(3, 8).index_add(0, torch.arange(3), x @ w), FLOAT32),
        (lambda x, w: torch.zeros(3, 8, dtype=BF16).index_add(0, torch.arange(3), x), BF16),
        (lambda x, w: F.batch_norm(x, torch.zeros(8), torch.ones(8), w[0], w[1], True), FLOAT32),
        (lambda x, w: F.batch_norm(x @ w, torch.zeros(8), torch.ones(8), None, None, True), BF16),
        (lambda x, w: torch.einsum("ij,jk->ik", x, w), BF16),
        (lambda x, w: F.scaled_dot_product_attention(x[None], (x @ w)[None], x[None]), BF16),
        (lambda x, w: torch.cat([w, w])[:3], BF16),
        (lambda x, w: F.layer_norm(input=x @ w, normalized_shape=(8,), weight=w[0]), BF16),
        (lambda x, w: F.batch_norm(input=x @ w, running_mean=torch.zeros(8), running_var=torch.ones(8)), BF16),
    ],
)
def test_functions_that_want_one_dtype(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    with computing("bf16", [weight], Copies()):
        assert call(torch.randn(3, 8), weight).dtype == dtype


def test_norms_of_a_cpu_add_up_in_float32() -> None:
    """Its kernels add the gradient of a bias up in bfloat16, 5% off for a thousand rows."""
    torch.manual_seed(0)
    x, gradient = torch.randn(1024, 64).to(BF16), (torch.randn(1024, 64) / 16 + 0.05).to(BF16)
    exact = gradient.float().sum(0)

    def error() -> float:
        norm = nn.LayerNorm(64)
        torch.autograd.backward(output_of(norm, "bf16", x), gradient)
        assert norm.bias.grad is not None
        return float((norm.bias.grad - exact).norm() / exact.norm())

    assert error() < 1e-3
    with for_gpu():  # whose own kernels would add up in float32
        assert error() > 1e-2


def test_lookups_on_a_cpu_add_up_in_float32() -> None:
    """A token that comes a thousand times adds up a thousand gradients, which bfloat16 would lose."""
    table = nn.Embedding(2, 1)
    torch.autograd.backward(output_of(table, "bf16", torch.zeros(1000, dtype=torch.long), Copies()).float().sum())
    assert table.weight.grad is not None
    assert table.weight.grad[0].item() == 1000.0


def test_calls_of_parts_of_a_model_return_float32() -> None:
    first = nn.Linear(4, 4)
    model = nn.Sequential(first, nn.Linear(4, 4))
    before = [vars(module).get("forward") for module in model.modules()]
    inside: list[Any] = []
    model[1].register_forward_pre_hook(lambda _, given: inside.append(given[0].dtype))
    with calls_computing("bf16", model, model.parameters, Copies()):
        assert model(torch.randn(2, 4)).dtype == FLOAT32
        assert inside == [BF16]
        assert first(torch.randn(2, 4)).dtype == FLOAT32
        assert (torch.randn(2, 4) @ first.weight).dtype == FLOAT32  # between the calls
    assert [vars(module).get("forward") for module in model.modules()] == before


class Exact(nn.Module):
    """A weight that bfloat16 rounds to 1, in a part of its own, and what is left of it after that part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.exact = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity())
        with torch.no_grad():
            self.exact.get_parameter("0.weight").copy_(torch.eye(4) * (1 + 2**-12))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        e = self.exact(torch.ones_like(h))
        self.seen = {
            "first": h.dtype,
            "exact": e.dtype,
            "weight": self.exact.get_parameter("0.weight").dtype,
            "left": float(e.detach()[0, 0] - 1),
        }
        output: Tensor = self.last(h + e)
        return output


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("patterns", [["exact"], ["exact.0"], ["exact.*"], ["exact.0.weight"], ["*.weight"]])
def test_what_is_named_computes_in_float32(precision: str, patterns: list[str]) -> None:
    module, x = Exact(), torch.randn(2, 4)
    kept = kept_of(precision, module, patterns)
    with computing(precision, module.parameters(), Copies(), kept):
        output = module(x)
    first = FLOAT32 if patterns == ["*.weight"] else BF16
    assert module.seen == {"first": first, "exact": FLOAT32, "weight": FLOAT32, "left": 2**-12}
    assert output.dtype == first
    assert [vars(each).get("forward") for each in module.modules()] == [None] * 6
    with computing(precision, module.parameters(), Copies()):
        module(x)
    assert module.seen["left"] == 0.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_recomputed_stays_in_float32(reentrant: bool) -> None:
    """A model that recomputes a part by itself, inside of what stays in float32 and around it."""

    class Recomputed(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.inner, self.again = Exact(), again

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant) if self.again else self.inner(x)
            return output

    for patterns in (["inner.exact"], [""], ["inner"]):
        gradients = []
        for again in (True, False):
            torch.manual_seed(0)
            module, x = Recomputed(again), torch.ones(4, 4, requires_grad=True)
            with computing("bf16", module.parameters(), Copies(), kept_of("bf16", module, patterns)):
                output = module(x)
            torch.autograd.backward(output.float().square().mean())
            gradients.append([p.grad for p in module.parameters()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_tied_parameter_is_kept_wherever_it_is() -> None:
    table, head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, head)
    for pattern in ("0", "1.weight"):
        kept = kept_of("bf16", model, [pattern])
        assert kept.names == {"0.weight"}
        with computing("bf16", model.parameters(), Copies(), kept):
            assert model(torch.tensor([1])).dtype == FLOAT32
    assert kept_of("float32", model, ["0"]).names == frozenset()


def test_a_part_that_is_called_by_itself_stays_in_float32() -> None:
    model = Exact()
    kept = kept_of("bf16", model, ["exact"])
    with calls_computing("bf16", model, model.parameters, Copies(), kept):
        assert float(model.exact(torch.ones(4)).detach()[0] - 1) == 2**-12
        model(torch.ones(2, 4))
        assert model.seen["left"] == 2**-12


def test_an_unknown_name_is_refused() -> None:
    check_kept(Exact(), ["exact", "*.weight", "exact.0.weight"])
    with pytest.raises(
        WorkloadError, match=r"'exakt' names neither a module nor a parameter .* did you mean 'exact'\?"
    ):
        check_kept(Exact(), ["first", "exakt"])


def test_a_module_without_words_about_precision_is_given_float32() -> None:
    """Its inputs are widened, in whatever they come, and what it returns is narrowed by the next product alone."""

    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> Tensor:
            assert {each.dtype for each in (*pair, scale)} == {FLOAT32}
            return (pair[0] @ pair[1].T).softmax(-1) * scale

    model, x = nn.Sequential(Pair(), nn.Linear(2, 2)), torch.randn(2, 2)
    with computing("bf16", model.parameters(), Copies(), kept_of("bf16", model, ["0"])):
        weights = model[0]((x.to(BF16), x.to(BF16)), scale=x.to(BF16))
        assert weights.dtype == FLOAT32
        assert (weights + 1).dtype == FLOAT32
        assert model[1](weights).dtype == BF16
