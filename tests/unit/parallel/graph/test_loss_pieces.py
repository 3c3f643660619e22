"""However a model spells its output layer and its loss, they are computed in pieces, or refused in one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from steps import workload
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.errors import StrategyError
from shardwise.parallel.check import check_strategy
from shardwise.parallel.faults import LOSS
from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.operators import graph_operators
from shardwise.parallel.operators.piecewise_loss import loss_and_gradients
from shardwise.parallel.program import Program
from shardwise.strategy import Strategy
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.workload import Workload

WORDS, FEATURES = 12, 8
TOKENS = torch.randint(0, WORDS, (6, 5), generator=torch.Generator().manual_seed(0))

Head = Callable[["Speaker", Tensor], Any]
Loss = Callable[[Any, Tensor], Tensor]


class Speaker(nn.Module):
    """Word embedding, a layer, and an output layer that `head` computes."""

    def __init__(self, head: Head, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.layer = nn.Embedding(WORDS, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.out = nn.Linear(FEATURES, WORDS)
        self.matrix = nn.Parameter(torch.randn(FEATURES, WORDS))
        if tied:
            self.out.weight = self.words.weight
        self.head = head

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self, self.layer(self.words(tokens)).tanh())


def linear(model: Speaker, x: Tensor) -> Tensor:
    output: Tensor = model.out(x)
    return output


def flat(output: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), tokens.flatten(), **options)


def shifted(output: Tensor, tokens: Tensor) -> Tensor:
    """The loss of causal language models in transformers."""
    labels = F.pad(tokens, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(output.float().view(-1, WORDS), labels.view(-1), ignore_index=-100)


def cut_off(output: Tensor, tokens: Tensor) -> Tensor:
    """The loss of causal language models in older versions of transformers."""
    return F.cross_entropy(output[..., :-1, :].contiguous().view(-1, WORDS), tokens[..., 1:].contiguous().view(-1))


def two_dimensional(model: Speaker, x: Tensor) -> Tensor:
    return torch.addmm(model.out.bias, x.view(-1, FEATURES), model.matrix).view(*x.shape[:2], WORDS)


WORKS: dict[str, tuple[Head, Loss]] = {
    "flat": (linear, flat),
    "shifted": (linear, shifted),
    "cut off": (linear, cut_off),
    "transposed": (linear, lambda output, tokens: F.cross_entropy(output.transpose(1, 2), tokens)),
    "permuted": (linear, lambda output, tokens: F.cross_entropy(output.permute(0, 2, 1)[:, :, 1:], tokens[:, 1:])),
    "last token": (linear, lambda output, tokens: F.cross_entropy(output[:, -1], tokens[:, 0])),
    "transposed, first token": (linear, lambda out, tokens: F.cross_entropy(out.transpose(1, 2)[..., 0], tokens[:, 0])),
    "product": (lambda model, x: x @ model.matrix, flat),
    "product with a view": (lambda model, x: x @ model.words.weight.T, flat),
    "product and bias": (two_dimensional, flat),
    "two heads": (
        lambda model, x: (model.out(x), x @ model.matrix),
        lambda output, tokens: flat(output[0], tokens) + flat(output[1], tokens[:, [1, 2, 3, 4, 0]]),
    ),
    "sum": (linear, lambda output, tokens: flat(output, tokens, reduction="sum") / 100),
    "smoothed": (linear, lambda output, tokens: flat(output, tokens, label_smoothing=0.1, ignore_index=3)),
}


def capped(model: Speaker, x: Tensor) -> Tensor:
    return 5 * torch.tanh(model.out(x) / 5)


REFUSED: dict[str, tuple[Head, Loss]] = {
    "class weights": (linear, lambda output, tokens: flat(output, tokens, weight=torch.ones(WORDS))),
    "one by one": (linear, lambda output, tokens: flat(output, tokens, reduction="none").mean()),
    "capped": (capped, flat),
    "used twice": (linear, lambda output, tokens: flat(output, tokens) + output.logsumexp(-1).square().mean()),
    "probabilities": (
        linear,
        lambda output, tokens: F.cross_entropy(output.flatten(0, 1), F.one_hot(tokens.flatten(), WORDS).float()),
    ),
    "other classes": (
        linear,
        lambda output, tokens: F.cross_entropy(output.view(-1, 2), tokens.repeat(1, 6).view(-1) % 2),
    ),
    "no cross entropy": (linear, lambda output, tokens: output.square().mean()),
    "narrowed": (linear, lambda output, tokens: flat(output.bfloat16(), tokens)),
}


def speaking(head: Head, loss: Loss, *, tied: bool = False, **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "dataset": TensorDataset(TOKENS),
        "loss": lambda output, batch: loss(output, batch[0]),
        **changes,
    }
    return workload(lambda: Speaker(head, tied=tied), TOKENS, **options)


def trained(work: Workload, strategy: str, steps: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    program = Program.build(work, Strategy.parse(strategy))
    epochs = itertools.chain.from_iterable(program.loader().shares(epoch) for epoch in itertools.count())
    losses = [float(program.step_share(share)) for share in itertools.islice(epochs, steps)]
    return losses, {piece.name: piece.local.detach().clone() for piece in program.gradient_pieces()} | {
        piece.name: piece.local.detach().clone() for piece in program.pieces()
    }


def assert_alike(work: Workload, strategy: str) -> None:
    (losses, found), (expected, wanted) = trained(work, strategy), trained(work, "single")
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("tied", [False, True])
def test_what_can_be_cut(name: str, tied: bool) -> None:
    assert_alike(speaking(*WORKS[name], tied=tied), "single,loss_pieces=3")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused(name: str) -> None:
    with pytest.raises(StrategyError, match=r"loss_pieces=2 needs a linear layer .* this step has none") as caught:
        check_strategy(speaking(*REFUSED[name]), Strategy.parse("single,loss_pieces=2"))
    assert "\n" not in str(caught.value)


def test_more_pieces_than_tokens_are_refused() -> None:
    work = speaking(*WORKS["flat"])
    check_strategy(work, Strategy.parse("dp=3,loss_pieces=10"))
    with pytest.raises(StrategyError, match="loss_pieces=11: the loss of a microbatch has 10 tokens; use 10 pieces or"):
        check_strategy(work, Strategy.parse("dp=3,loss_pieces=11"))


def test_a_last_small_batch_may_have_fewer_tokens() -> None:
    assert_alike(speaking(*WORKS["last token"], batch_size=4), "single,loss_pieces=3")  # of 6 samples


def test_inputs_that_are_overwritten_are_left() -> None:
    def overwritten(model: Speaker, x: Tensor) -> Tensor:
        output: Tensor = model.out(x.detach())
        x.mul_(2)
        return output

    with pytest.raises(StrategyError, match="this step has none"):
        check_strategy(speaking(overwritten, flat), Strategy.parse("single,loss_pieces=2"))


@pytest.mark.parametrize("recompute", ["full", "selective", "1/2"])
def test_recomputation_takes_what_is_known(recompute: str) -> None:
    work = speaking(*WORKS["flat"])
    assert_alike(work, f"single,loss_pieces=3,recompute={recompute},microbatches=2")
    name = f"{graph_operators.__name__}.loss_and_gradients"
    with mock.patch(name, side_effect=loss_and_gradients) as counted:
        trained(work, f"single,loss_pieces=3,recompute={recompute},microbatches=2")
    assert counted.call_count == 2 * 2  # steps times microbatches


def test_frozen_weights_have_no_gradient() -> None:
    def model() -> nn.Module:
        made = Speaker(linear)
        made.out.requires_grad_(False)
        return made

    work = speaking(*WORKS["flat"])
    frozen = workload(model, TOKENS, dataset=work.dataset, loss=work.loss)
    assert_alike(frozen, "single,loss_pieces=3")


def test_evaluations_are_left() -> None:
    work = speaking(*WORKS["flat"])
    accuracy = Evaluation(
        dataset=work.dataset,
        metric="right",
        measure=lambda output, batch: (output.argmax(-1) == batch[0]).float().mean(),
    )
    evaluated = speaking(*WORKS["flat"], evaluation=accuracy)
    found, expected = (
        Program.build(evaluated, Strategy.parse(each)).evaluate() for each in ("single,loss_pieces=3", "single")
    )
    assert found == pytest.approx(expected)
    assert "right" in found


def test_not_a_number_is_found() -> None:
    work = speaking(*WORKS["flat"])
    program = Program.build(work, Strategy.parse("single,loss_pieces=3"))
    assert isinstance(program.engine, GraphEngine)
    with torch.no_grad():
        program.engine.parameters["out.weight"].fill_(float("nan"))
    share = next(program.loader().shares(0))
    fault = program.engine.find_fault(share, [torch.ones(())])
    assert fault is not None
    assert fault.what == LOSS
