"""The proof that every strategy rests on: the same steps in one process and in parallel give the same numbers.

result = train(workers, make_workload, "dp=2,tp=2")            # losses, gradients, parameters, buffers: all global
assert_equal(result, reference(workers, make_workload, "dp=2,tp=2"), 1e-6)
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pool import Pools
from torch import Tensor
from traces import remembered

from shardwise.parallel.program import Program
from shardwise.parallel.state.layout import Layout, TensorPiece
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.strategy import Strategy
from shardwise.workload.data import Share
from shardwise.workload.workload import Workload

Factory = Callable[[], Workload]
DOUBLE_TOLERANCE = 1e-10


@dataclass
class Result:
    """State that some steps left behind, as full tensors.

    `gradients` are those of the last step after clipping, `state` the parameters and buffers by their name in the
    plain module, `optimizer` its state by `<parameter>/<state>`.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class Part:
    """One worker's part of a result."""

    losses: list[float]
    norms: list[float]
    pieces: list[tuple[str, Tensor, Layout, bool]]
    evaluation: dict[str, float]
    notes: tuple[str, ...]


def train(
    workers: Pools, factory: Factory, strategy: str, steps: int = 3, *, evaluate: bool = False, before: Any = None
) -> Result:
    """Runs `steps` steps under `strategy` in the pool. `before(program)` runs on each worker first."""
    count = Strategy.parse(strategy).workers
    return merge(workers(count, train_part, factory, strategy, steps, evaluate, before))


_references: dict[Any, Result] = {}


def reference(workers: Pools, factory: Factory, strategy: str, steps: int = 3, *, evaluate: bool = False) -> Result:
    """Take these steps in one process, cut into the same number of microbatches as under `strategy`."""
    settled = Strategy.parse(strategy).for_batch(factory().batch_size)
    single = str(Strategy(microbatches=settled.microbatches, precision=settled.precision))
    key = (factory, single, steps, evaluate)
    if key not in _references:
        _references[key] = train(workers, factory, single, steps, evaluate=evaluate)
    return _references[key]


def train_part(factory: Factory, strategy: str, steps: int, evaluate: bool, before: Any) -> Part:
    """Take the steps on one worker, and return its part of the result."""
    with remembered(factory):
        return _train_part(factory, strategy, steps, evaluate, before)


def _train_part(factory: Factory, strategy: str, steps: int, evaluate: bool, before: Any) -> Part:
    program = Program.build(factory(), Strategy.parse(strategy))
    if before is not None:
        before(program)
    losses, norms = [], []
    epoch = 0
    shares = program.loader().shares(epoch)
    for _ in range(steps):
        share = next(shares, None)
        if share is None:
            epoch += 1
            shares = program.loader().shares(epoch)
            share = next(shares)
        losses.append(float(program.step_share(share)))
        norms.append(math.nan if program.gradient_norm is None else float(program.gradient_norm))
    pieces = [portable(piece) for piece in [*program.gradient_pieces(), *program.pieces()]]
    return Part(losses, norms, pieces, program.evaluate() if evaluate else {}, program.notes)


def portable(piece: TensorPiece) -> tuple[str, Tensor, Layout, bool]:
    return piece.name, piece.local.detach().clone(), piece.layout, piece.writes


def merge(parts: Sequence[Part]) -> Result:
    """One result from those of the workers, who must agree on losses, norms and evaluation."""
    first = parts[0]
    for part in parts[1:]:
        assert part.losses == first.losses, "workers report different losses"
        assert part.evaluation == first.evaluation, "workers report different evaluations"
        assert [repr(n) for n in part.norms] == [repr(n) for n in first.norms], "workers report different norms"
    tensors = paste([piece for part in parts for piece in part.pieces])
    kinds: dict[str, dict[str, Tensor]] = {"gradient": {}, "model": {}, "optimizer": {}, "owed": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "average":
            kinds["model"][name] = tensor
        else:
            kinds[kind][rest] = tensor
    return Result(
        first.losses, first.norms, kinds["gradient"], kinds["model"], kinds["optimizer"], first.evaluation, first.notes
    )


def paste(pieces: Sequence[tuple[str, Tensor, Layout, bool]]) -> dict[str, Tensor]:
    """Full tensors. Every element must be written by exactly one worker, and be equal on all that hold it."""
    full: dict[str, Tensor] = {}
    writers: dict[str, Tensor] = {}
    for name, local, layout, writes in pieces:
        assert tuple(local.shape) == layout.local_shape, (name, local.shape, layout)
        if name not in full:
            full[name] = local.new_zeros(layout.shape)
            writers[name] = torch.zeros(layout.shape, dtype=torch.int)
        if writes:
            layout.paste(local, full[name])
            mine = torch.zeros_like(writers[name])
            layout.paste(torch.ones(local.shape, dtype=torch.int), mine)
            writers[name] += mine
    for name, count in writers.items():
        assert bool((count == 1).all()), (
            f"{name}: some elements are written by {sorted(set(count.flatten().tolist()))} workers"
        )
    for name, local, layout, _ in pieces:
        told = partial("{}: {}".format, name)
        torch.testing.assert_close(layout.cut(full[name]), local, rtol=1e-6, atol=1e-7, equal_nan=True, msg=told)
    return full


def tensor_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """(largest relative error over the tensors, its name): ||a - b|| / max(||b||, what a tensor of its size has).

    The second term keeps a gradient that is zero but for rounding from counting.
    """
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    floats = {name: tensor.double() for name, tensor in expected.items() if tensor.is_floating_point()}
    elements = sum(tensor.numel() for tensor in floats.values())
    typical = math.sqrt(sum(float(tensor.square().sum()) for tensor in floats.values()) / max(elements, 1))
    worst = (0.0, "")
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        if name not in floats:
            assert torch.equal(actual[name], tensor), f"{name}: {actual[name]} != {tensor}"
            continue
        difference = float((actual[name].double() - floats[name]).norm())
        scale = max(float(floats[name].norm()), typical * math.sqrt(tensor.numel()))
        error = difference / scale if scale else difference
        worst = max(worst, (error if error == error else math.inf, name))
    return worst


def errors(actual: Result, expected: Result) -> dict[str, tuple[float, str]]:
    """The largest relative error of each kind of number, and where it is."""
    pairs = list(zip(actual.losses, expected.losses, strict=True))
    found = {
        "loss": max((abs(a - b) / abs(b), f"step {step}") for step, (a, b) in enumerate(pairs)),
        "gradient": tensor_error(actual.gradients, expected.gradients),
        "state": tensor_error(actual.state, expected.state),
        "optimizer": tensor_error(actual.optimizer, expected.optimizer),
    }
    norms = [
        (abs(a - b) / abs(b), f"step {s}")
        for s, (a, b) in enumerate(zip(actual.norms, expected.norms, strict=True))
        if not (math.isnan(a) and math.isnan(b))
    ]
    found["norm"] = max(norms, default=(0.0, ""))
    evaluation = [(abs(actual.evaluation[k] - v) / max(abs(v), 1e-12), k) for k, v in expected.evaluation.items()]
    assert actual.evaluation.keys() == expected.evaluation.keys()
    found["evaluation"] = max(evaluation, default=(0.0, ""))
    return found


def shares_of(program: Program, steps: int) -> Iterator[Share]:
    """Return an iterator over the shares of `steps` steps, from the step that the program is at."""
    epochs = itertools.chain.from_iterable(program.loader().shares(epoch) for epoch in itertools.count())
    return itertools.islice(epochs, program.steps, program.steps + steps)


def resumed(factory: Factory, folder: Path, strategy: str, steps: int) -> list[float]:
    """Go on from the newest checkpoint in a folder where there is one, and leave one. Returns the losses."""
    program = Program.build(factory(), Strategy.parse(strategy))
    checkpoints = Checkpoints(folder)
    if path := checkpoints.latest():
        checkpoints.load(program, path)
    losses = [float(program.step_share(share)) for share in shares_of(program, steps)]
    checkpoints.save(program, {"batch": program.steps})
    checkpoints.wait()
    return losses


def check(workers: Pools, factory: Factory, strategy: str, steps: int = 3) -> None:
    """In double precision, with evaluation where there is one; one process has nothing to recompute."""
    evaluate = factory().evaluation is not None
    expected = reference(workers, factory, re.sub(r",recompute=[^,]+", "", strategy), steps, evaluate=evaluate)
    assert_equal(train(workers, factory, strategy, steps, evaluate=evaluate), expected, DOUBLE_TOLERANCE)


def assert_equal(
    actual: Result, expected: Result, tolerance: float, *, gradient_tolerance: float | None = None
) -> None:
    """Fails naming every kind of number whose error is above the tolerance."""
    found = errors(actual, expected)
    limits = dict.fromkeys(found, tolerance) | {"gradient": gradient_tolerance or tolerance}
    wrong = {kind: value for kind, value in found.items() if not value[0] <= limits[kind]}
    assert not wrong, f"beyond the tolerance {tolerance}: {wrong}; all: {found}"
