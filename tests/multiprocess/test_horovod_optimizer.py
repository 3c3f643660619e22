"""DistributedOptimizer of shardwise.compat.horovod trains as one process does on the whole batch.

After the list of Horovod's own tests (test/parallel/test_torch.py).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pool import Pools
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise.compat.horovod as hvd
from shardwise.errors import RequestError

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def started(function: Callable[..., Any], *args: Any) -> Any:
    hvd.init()
    torch.manual_seed(0)
    result = function(*args)
    hvd.shutdown()
    return result


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 4, generator=generator).double(), torch.randint(0, 3, (rows,), generator=generator))
        for _ in range(count)
    ]


def part(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """This rank's share of a batch."""
    return batch[0].chunk(hvd.size())[hvd.rank()], batch[1].chunk(hvd.size())[hvd.rank()]


def alone(make: Make, steps: int, rows: int, scale: float = 1.0) -> list[Tensor]:
    """Parameters that one process has after training on whole batches."""
    model = network()
    optimizer = make(model.parameters())
    for x, y in batches(steps, rows):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * scale).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return list(model.parameters())


def assert_close(model: nn.Module, wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    for got, expected in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(got, expected, atol=tolerance), float((got - expected).abs().max())


def trains_alike(name: str, options: dict[str, Any], scale: float = 1.0, tolerance: float = 1e-10) -> None:
    model, rows = network(), 6 * hvd.size()
    if options.get("groups") == "layers":
        options = {**options, "groups": [list(model[0].parameters()), list(model[2].parameters())]}
    plain = OPTIMIZERS[name](model.parameters())
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), **options)
    assert isinstance(optimizer, type(plain))
    for batch in batches(4, rows):
        x, y = part(batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert_close(model, alone(OPTIMIZERS[name], 4, rows, scale), tolerance)


OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1e-10),
    "predivided": ({"gradient_predivide_factor": 2.0}, 1e-10),
    "one group": ({"num_groups": 1}, 1e-10),
    "three groups": ({"groups": 3}, 1e-10),
    "groups of layers": ({"groups": "layers"}, 1e-10),
    "halves": ({"compression": hvd.Compression.fp16}, 2e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_trains_as_one_process(workers: Pools, name: str, options: str) -> None:
    workers(2, started, trains_alike, name, OPTIONS[options][0], 1.0, OPTIONS[options][1])


def test_a_sum_is_the_average_times_the_ranks(workers: Pools) -> None:
    workers(3, started, trains_alike, "sgd", {"op": "Sum"}, 3.0)


def accumulates() -> None:
    model, rows = network(), 8 * hvd.size()
    optimizer = hvd.DistributedOptimizer(
        OPTIMIZERS["sgd"](model.parameters()), model.named_parameters(), backward_passes_per_step=2
    )
    for batch in batches(3, rows):
        x, y = part(batch)
        optimizer.zero_grad()
        for one, label in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(one), label) / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert_close(model, alone(OPTIMIZERS["sgd"], 3, rows))
    x, y = part(batches(1, rows)[0])
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="more than backward_passes_per_step=2 times"):
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.synchronize()
    optimizer.set_backward_passes_per_step(3)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="are being reduced"):
        optimizer.zero_grad()
    optimizer.step()


def closes() -> None:
    model, rows = network(), 6 * hvd.size()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model.named_parameters())
    for batch in batches(3, rows):
        x, y = part(batch)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        assert optimizer.step(closure).dim() == 0
    assert_close(model, alone(OPTIMIZERS["sgd"], 3, rows))


def clips() -> None:
    model, rows = network(), 6 * hvd.size()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model.named_parameters())
    whole, single = network(), None
    single = OPTIMIZERS["sgd"](whole.parameters())
    for batch in batches(3, rows):
        x, y = part(batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with optimizer.skip_synchronize():
                optimizer.step()
        single.zero_grad()
        F.cross_entropy(whole(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        single.step()
    assert_close(model, list(whole.parameters()))
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.synchronize()
    with pytest.warns(UserWarning, match=r"step\(\) called without optimizer.skip_synchronize\(\) context"):
        optimizer.step()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Any:
        return (self.second if hvd.rank() % 2 else self.first)(x)


def branches() -> None:
    """Each rank computes gradients of other parameters; the missing ones count as zeros."""
    torch.manual_seed(0)
    model = Branches()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    x = torch.tensor([[1.0, 2.0]])
    model(x).sum().backward()
    optimizer.step()
    odd = hvd.size() // 2
    for index, share in enumerate([hvd.size() - odd] * 2 + [odd] * 2):
        gradient = torch.tensor([[1.0, 2.0]]) if index % 2 == 0 else torch.tensor([1.0])
        wanted = before[index] - gradient * share / hvd.size()
        assert torch.allclose(list(model.parameters())[index], wanted)


def freezes() -> None:
    """Two models of an adversarial training, whose parameters take turns to need a gradient."""
    torch.manual_seed(hvd.rank())
    maker, judge = nn.Linear(3, 3), nn.Linear(3, 1)
    for model in (maker, judge):
        hvd.broadcast_parameters(model.state_dict(), 0)
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
        for model in (maker, judge)
    ]
    for step in range(4):
        for parameter in judge.parameters():
            parameter.requires_grad_(step % 2 == 1)
        for parameter in maker.parameters():
            parameter.requires_grad_(step % 2 == 0)
        optimizer = optimizers[step % 2]
        judge(maker(torch.randn(5, 3))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter in [*maker.parameters(), *judge.parameters()]:
        assert torch.equal(hvd.broadcast(parameter.detach(), 0), parameter.detach())


def embeds(as_dense: bool) -> None:
    table = nn.Embedding(6, 2, sparse=True)
    before = table.weight.detach().clone()
    hvd.broadcast_(before, 0)
    hvd.broadcast_parameters(table.named_parameters(), 0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), lr=1.0), table.named_parameters(), sparse_as_dense=as_dense
    )
    table(torch.tensor([0, hvd.rank() + 1])).sum().backward()
    optimizer.step()
    share = torch.zeros(6, 2)
    share[0] = 1
    share[1 : hvd.size() + 1] = 1 / hvd.size()
    assert torch.allclose(table.weight, before - share)


def names() -> None:
    model = network()
    make = OPTIMIZERS["sgd"]
    cases: list[tuple[Any, str]] = [
        ([("a", parameter) for parameter in model.parameters()], "unique"),
        (list(model.named_parameters())[:1], "lacks 3 parameters"),
        (list(model.parameters()), "pairs"),
    ]
    for wrong, said in cases:
        with pytest.raises(ValueError, match=said):
            hvd.DistributedOptimizer(make(model.parameters()), named_parameters=wrong)
    with pytest.raises(ValueError, match="needs op=Average"):
        hvd.DistributedOptimizer(make(model.parameters()), gradient_predivide_factor=2.0, op=hvd.Sum)
    with pytest.raises(ValueError, match="backward_passes_per_step=0: must be 1 or more"):
        hvd.DistributedOptimizer(make(model.parameters()), backward_passes_per_step=0)
    with pytest.raises(ValueError, match="several groups"):
        hvd.DistributedOptimizer(make(model.parameters()), groups=[list(model.parameters())] * 2)
    optimizer = hvd.DistributedOptimizer(make([{"params": model[0].parameters()}, {"params": model[2].parameters()}]))
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()


STATES: dict[str, Make] = {
    **OPTIMIZERS,
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, betas=(0.8, 0.95)),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.01),
}


def same_state(name: str, wrap: bool) -> None:
    """After the broadcasts all ranks have what rank 0 had, also if it alone has trained."""
    model = network()
    optimizer = STATES[name](model.parameters())
    if hvd.rank() == 0:
        x, y = batches(1, 4)[0]

        def closure() -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(2):
            optimizer.step(closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.5
    if wrap:
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    hvd.broadcast_optimizer_state(optimizer, 0, model)
    for value in hvd.allgather_object(optimizer.state_dict()):
        assert str(value) == str(optimizer.state_dict())
    for parameter in model.parameters():
        assert torch.equal(hvd.broadcast(parameter.detach(), 0), parameter.detach())


def broadcasts_badly() -> None:
    with pytest.raises(ValueError, match="state dict or a list"):
        hvd.broadcast_parameters(torch.ones(1), 0)
    with pytest.raises(ValueError, match="'x' is no tensor"):
        hvd.broadcast_parameters({"x": 1}, 0)
    model = network()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "hook": print}], lr=0.1)
    if hvd.rank() == 0:
        with pytest.raises(RequestError, match="builtin_function_or_method cannot be sent"):
            hvd.broadcast_optimizer_state(optimizer, 0)


def adaptive() -> None:
    """Adasum averages equal updates: all ranks train as one does by itself."""
    model = network()
    optimizer = hvd.DistributedOptimizer(
        OPTIMIZERS["adam"](model.parameters()), model.named_parameters(), op=hvd.Adasum
    )
    for x, y in batches(3, 6):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert_close(model, alone(OPTIMIZERS["adam"], 3, 6))
    with pytest.raises(AssertionError, match="the step itself"), optimizer.skip_synchronize():
        pass


def runs_dry() -> None:
    """A rank with fewer batches joins; the others go on with its zeros."""
    model = network()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model.named_parameters())
    for x, y in batches(2 + hvd.rank(), 4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert hvd.join() == hvd.size() - 1


def schedules() -> None:
    """A scheduler that was made before the optimizer was wrapped changes the learning rate of the wrapped one."""
    model = network()
    plain = OPTIMIZERS["sgd"](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.1)
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters())
    model(torch.full((1, 4), float(hvd.rank())).double()).sum().backward()
    optimizer.step()
    plain.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    optimizer.load_state_dict(optimizer.state_dict())
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [extra := nn.Parameter(torch.zeros(2))], "lr": 1.0})
    (extra * hvd.rank()).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.allclose(extra, torch.full((2,), -sum(range(hvd.size())) / hvd.size()))


def freezes_one_of_a_group() -> None:
    model: Any = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), model.named_parameters(), num_groups=1
    )
    frozen = model[0].weight.requires_grad_(False)
    before, other = frozen.clone(), model[2].weight.detach().clone()
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(model[2].weight, other)


@pytest.mark.parametrize(
    "function",
    [
        freezes_one_of_a_group,
        accumulates,
        closes,
        clips,
        branches,
        freezes,
        names,
        broadcasts_badly,
        runs_dry,
        schedules,
        adaptive,
    ],
)
def test_two_ranks(workers: Pools, function: Callable[[], None]) -> None:
    workers(2, started, function)


def test_ranks_with_other_parts_of_the_model(workers: Pools) -> None:
    workers(3, started, branches)


@pytest.mark.parametrize("as_dense", [False, True])
def test_sparse_gradients(workers: Pools, as_dense: bool) -> None:
    workers(2, started, embeds, as_dense)


@pytest.mark.parametrize(("name", "wrap"), itertools.product(STATES, (False, True)))
def test_state_of_rank_0(workers: Pools, name: str, wrap: bool) -> None:
    workers(2, started, same_state, name, wrap)
