"""Backward code of one's own (autograd functions, hooks, derivatives) and values in Python that a forward changes."""

# mypy: disable-error-code="no-untyped-call,no-any-return,attr-defined,union-attr,override,operator"
# mypy: disable-error-code="assignment,arg-type,var-annotated,unused-ignore"

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import assert_equal, check, reference, train
from pool import Pools
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from shardwise import Evaluation, Workload
from shardwise.errors import StrategyError, WorkloadError

EVERYWHERE = ["dp=2", "fsdp=2", "tp=2", "pp=2", "tp=2,pp=2,recompute=full"]


class Reverse(Function):
    """Reverses the gradient, and limits each of its elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return -gradient.clamp(-ctx.limit, ctx.limit), None


class Rounded(Function):
    """Rounds; the gradient goes straight through."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient


class Attention(Function):
    """Several tensors in and out, one of them without gradient, one result that is no tensor, a default."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> Any:
        p = torch.softmax(q @ k.transpose(-1, -2) * scale, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        ctx.mark_non_differentiable(p)
        return p @ v, p, None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v, p = ctx.saved_tensors
        to_p = gradient @ v.transpose(-1, -2)
        to_s = p * (to_p - (to_p * p).sum(-1, keepdim=True)) * ctx.scale
        return 2 * to_s @ k, to_s.transpose(-1, -2) @ q, p.transpose(-1, -2) @ gradient, None


class CrossEntropy(Function):
    """A loss with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1), labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        p, labels = ctx.saved_tensors
        return gradient * (p - F.one_hot(labels, p.shape[-1])) / len(p) * 0.7, None


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y, p, _ = Attention.apply(self.q(x), self.k(x), self.v(x))
        return Rounded.apply(y) + 0 * p.sum()


class Limited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.reverse = nn.Linear(16, 16), Reverse.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.reverse(self.inner(x), 1e-3)


class Plain(nn.Module):
    """Remembers its last output and shape, which nobody reads: it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last, self.shape = nn.Linear(16, 16), None, None

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.shape = self.inner(x), tuple(x.shape)
        return torch.relu(self.last)


class Anneals(nn.Module):
    """Counts its calls, goes other ways by their number, and remembers a mean from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(16, 16), nn.Dropout(0.1)
        self.calls, self.seen, self.mean = 0, [], None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        self.seen.append(self.calls)
        y = self.drop(self.inner(x)) * (1 + len(self.seen) / 10)
        if self.calls % 2:
            y = torch.relu(y)
        if self.mean is not None:
            y = y - self.mean
        self.mean = y.detach().sum() * 0 + self.calls
        return y


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Gated(nn.Module):
    """Changes a number of another module: the smallest module around both runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner, self.time = Gate(), nn.Linear(16, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.time += 1
        self.gate.scale = 0.9**self.time
        return self.gate(self.inner(x))


class Force(nn.Module):
    """A derivative inside the forward, and a hook on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.energy = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(torch.tanh(self.inner(x))).sum(), x, create_graph=True)
        if force.requires_grad:
            force.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return force


class Net(nn.Module):
    def __init__(self, *kinds: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 16), nn.ModuleList(kind() for kind in kinds)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean(1))


def work(*kinds: Callable[[], nn.Module], change: Callable[[Net], Any] | None = None, **options: Any) -> Workload:
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(
        torch.randn(24, 5, 6, generator=generator, dtype=torch.float64),
        torch.randint(0, 4, (24,), generator=generator),
    )

    def model() -> nn.Module:
        net = Net(*kinds).double()
        if change is not None:
            change(net)
        return net

    fields: dict[str, Any] = {
        "name": "own",
        "model": model,
        "dataset": data,
        "inputs": lambda batch: batch[0],
        "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "batch_size": 8,
    }
    return Workload(**fields | options)


def functions() -> Workload:
    w = work(Attends, Limited, loss=lambda output, batch: CrossEntropy.apply(output, batch[1]))
    measured = Evaluation(dataset=w.dataset, metric="m", measure=lambda output, batch: Rounded.apply(output).mean())
    return dataclasses.replace(w, evaluation=measured)


@pytest.mark.parametrize("strategy", [*EVERYWHERE, "fsdp=2,tp=2", "pp=2,microbatches=4,schedule=zero-bubble"])
def test_autograd_functions_keep_their_backward(strategy: str, workers: Pools) -> None:
    check(workers, functions, strategy)


def annealed() -> Workload:
    return work(Anneals, Gated, Plain)


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2", "tp=2,pp=2,microbatches=4,recompute=full"])
def test_what_a_forward_changes_evolves_as_in_one_process(strategy: str, workers: Pools) -> None:
    check(workers, annealed, strategy)


def recomputed() -> Workload:
    return work(Anneals, Anneals, Anneals)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_does_not_count_twice(kind: str, workers: Pools) -> None:
    result = train(workers, recomputed, f"single,recompute={kind}")
    assert_equal(result, train(workers, recomputed, "single"), 1e-12)


def forces() -> Workload:
    return work(Force, Plain)


@pytest.mark.parametrize(
    "strategy",
    ["dp=2", "fsdp=2", "dp=2,recompute=full", "fsdp=2,recompute=full", "tp=2", "pp=2", "tp=2,pp=2,recompute=full"],
)
def test_derivatives_and_hooks_on_tensors_in_a_forward(strategy: str, workers: Pools) -> None:
    check(workers, forces, strategy)


def hook_parameters(net: Net) -> None:
    mask = torch.zeros(16, 1, dtype=torch.float64)
    mask[::2] = 1
    net.blocks[0].inner.weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[union-attr, operator]
    net.up.weight.register_hook(lambda gradient: gradient / (1 + gradient.norm()))
    net.down.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    net.down.weight.register_hook(lambda gradient: None if gradient.sum() > 9 else gradient * 3)
    net.first.weight.register_hook(lambda gradient: gradient * 0).remove()

    def decay(parameter: Any) -> None:
        parameter.data.mul_(0.99)
        parameter.grad = parameter.grad - parameter.grad.mean(0, keepdim=True) + 0.1 * parameter.data

    net.head.weight.register_post_accumulate_grad_hook(decay)
    net.up.bias.register_post_accumulate_grad_hook(decay)


def hooked_parameters() -> Workload:
    return work(Plain, Plain, change=hook_parameters, clip_norm=0.1)


@pytest.mark.parametrize("strategy", [*EVERYWHERE, "fsdp=2,zero=1", "dp=2,tp=2"])
def test_hooks_on_parameters_see_whole_gradients(strategy: str, workers: Pools) -> None:
    once = train(workers, hooked_parameters, "single,microbatches=1")
    assert_equal(train(workers, hooked_parameters, strategy), once, 1e-10)


def hook_modules(net: Net) -> None:
    def limited(module: nn.Module, gradients: Any, _: Any) -> Any:
        return tuple(None if gradient is None else gradient.clamp(-1e-3, 1e-3) for gradient in gradients)

    net.blocks[0].register_full_backward_hook(limited)
    net.blocks[1].register_full_backward_pre_hook(lambda module, gradients: tuple(each * 2 for each in gradients))
    net.up.register_forward_hook(lambda module, given, output: output * 1.5)
    net.down.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    parametrizations.weight_norm(net.head)
    parametrizations.spectral_norm(net.first)


def hooked_modules() -> Workload:
    return work(Plain, Plain, change=hook_modules)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2", "tp=2,pp=2"])
def test_hooks_on_modules_and_parametrizations(strategy: str, workers: Pools) -> None:
    check(workers, hooked_modules, strategy)


def reading() -> Workload:
    def change(net: Net) -> None:
        net.up.weight.register_hook(lambda gradient: gradient + 0.1 * net.up.weight.detach())

    return work(Plain, change=change)


def test_a_hook_that_reads_parameters_is_kept_or_refused(workers: Pools) -> None:
    check(workers, reading, "dp=2")
    with pytest.raises(StrategyError, match=r"hook on parameter 'up\.weight' uses Net"):
        train(workers, reading, "fsdp=2")


def scheduled() -> Workload:
    """A dropout rate, and a number that the loss reads, change between the steps."""
    held: dict[str, Any] = {}
    share = [1.0]

    def change(net: Net) -> None:
        net.blocks[0].inner = nn.Sequential(net.blocks[0].inner, nn.Dropout(0.0))  # type: ignore[arg-type]
        held["net"] = net

    def schedule(optimizer: Any) -> Any:
        def rate(_: int) -> float:
            held["net"].blocks[0].inner[1].p += 0.1
            share[0] *= 0.5
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1]) * share[0]

    w = work(Plain, Anneals, change=change, schedule=schedule, loss=loss)
    measured = Evaluation(dataset=w.dataset, metric="m", measure=lambda output, _: output.square().mean(), batch_size=4)
    return dataclasses.replace(w, evaluation=measured)


@pytest.mark.parametrize("strategy", ["tp=2", "tp=2,pp=2"])
def test_what_a_schedule_changes_between_steps(strategy: str, workers: Pools) -> None:
    check(workers, scheduled, strategy)


def unfrozen() -> Workload:
    held: list[Net] = []

    def change(net: Net) -> None:
        net.up.requires_grad_(False)
        held.append(net)

    def schedule(optimizer: Any) -> Any:
        def rate(step: int) -> float:
            if step == 1:
                held[-1].up.requires_grad_(True)
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    return work(Plain, change=change, schedule=schedule)


@pytest.mark.parametrize("strategy", ["dp=2", "tp=2"])
def test_a_parameter_that_is_unfrozen_later_is_named(strategy: str, workers: Pools) -> None:
    with pytest.raises(WorkloadError, match=r"requires_grad of parameter 'up\.weight' has changed"):
        train(workers, unfrozen, strategy)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x) + torch.relu(self.inner(self.embed(x).mean(1, keepdim=True))))


def assigned(precision: str) -> Workload:
    """Changes in place in `inputs`, `loss` and `measure`: slices, masks, views of views, index_put, `+=`."""
    tokens = torch.randint(0, 60, (24, 16), generator=torch.Generator().manual_seed(5))

    def hide(batch: Any) -> Tensor:
        x = batch[0].clone()
        x[:, 3::7] = 61
        x[x > 50] = 62
        x.view(-1)[5:9] += 1
        whole = torch.full_like(x, 60)
        whole[:, :8] = x[:, :8]
        whole[0::2, 9:] = x[0::2, 9:]
        return whole

    def loss(output: Tensor, batch: Any) -> Tensor:
        labels = batch[0].clone()
        labels[:, :6] = -100
        labels.index_put_((torch.tensor([0, 1]), torch.tensor([7, 8])), torch.tensor(-100))
        output[:, :, 60:] = -30.0
        output[:, 2] *= 0.5
        output[:, 4:12][..., 3] -= 1
        output.transpose(0, 1)[8].add_(0.1)
        return F.cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=-100)

    return Workload(
        name="assigned",
        model=Words,
        dataset=TensorDataset(tokens),
        inputs=hide,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        precision=precision,
        evaluation=Evaluation(dataset=TensorDataset(tokens), metric="m", measure=loss),
    )


def assigned_bf16() -> Workload:
    return assigned("bf16")


def assigned_float32() -> Workload:
    return assigned("float32")


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2"])
@pytest.mark.parametrize(("make", "tolerance"), [(assigned_bf16, 2e-2), (assigned_float32, 1e-5)])
def test_changes_in_place_outside_the_module(
    make: Callable[[], Workload], tolerance: float, strategy: str, workers: Pools
) -> None:
    result = train(workers, make, strategy, evaluate=True)
    assert_equal(result, reference(workers, make, strategy, evaluate=True), tolerance)
