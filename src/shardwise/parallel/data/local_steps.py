"""Local steps: replicas along dp train by themselves, and average their parameters now and then.

    average             parameters become the mean over the replicas                    (local SGD; Stich 2019)
    nesterov            last - mean is the gradient of an outer SGD with Nesterov       (DiLoCo; Douillard et al. 2023)
    fragments           parts of the parameters are averaged at different steps         (Douillard et al. 2025)
    delay               the mean of what was sent is merged `delay` steps later: parameters become
                        mean + (what they are now - what was sent), so that no step is lost (DaSGD; Zhou et al. 2020)

A replica counts in a mean by the samples that it has trained on since the last one (by their weight, if the workload
has one). So the mean after one step of SGD is a step by the mean gradient of the batch, however it was cut. Floating
point buffers, such as the statistics of batch norm, are averaged with the first fragment; other buffers stay each
replica's own, and so does the state of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import StrategyError
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.gather import gather_json
from shardwise.parallel.state.layout import TensorPiece, TensorPlacement
from shardwise.splitting.local_steps import LEARNING_RATE, MOMENTUM, averaged_after, cut_fragments
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def check_local(workload: Workload, strategy: Strategy) -> None:
    """Check that replicas can train a workload by themselves between averages. Raises StrategyError."""
    if not strategy.local:
        return
    if workload.whole_batch:
        raise StrategyError(
            f"local={strategy.local}: a loss of the whole batch cannot be computed by each replica alone; leave out "
            "local, or whole_batch of the workload"
        )
    if workload.after_step is not None and strategy.outer != "average":
        raise StrategyError(
            f"outer={strategy.outer}: an outer step may undo what after_step of workload {workload.name!r} does; use "
            "outer=average"
        )


@dataclass(frozen=True, slots=True)
class _Sent:
    """Average on its way.

    Attributes:
        due: number of completed steps after which it is merged.
        messages: (handle to wait for, its flat tensor, the tensors in it) of each dtype.
        before: what was sent, by name; empty if nothing changes until it is merged.
    """

    due: int
    messages: tuple[tuple[Any, Tensor, tuple[str, ...]], ...]
    before: Mapping[str, Tensor]


class LocalSteps:
    """Averages of the replicas along dp. Every method is collective over them.

    Args:
        held: tensors held here by name, see `Engine.held`.
        trained: all trained parameters of the plain module, whole, in its order; see `Engine.trained`.
        mesh: position of this worker; its strategy has local steps.

    Raises:
        StrategyError: there are more fragments than parameters.
    """

    def __init__(self, held: Mapping[str, TensorPlacement], trained: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
        group = mesh.group("dp")
        assert group is not None
        self._strategy, self._group, self._mesh, self._held = mesh.strategy, group, mesh, held
        self._fragments = _fragments(held, trained, mesh.strategy.fragments)
        zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._own, self._all = [zero] * len(self._fragments), [zero] * len(self._fragments)
        self._sent: dict[int, _Sent] = {}
        self._last: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        if mesh.strategy.outer == "nesterov":
            mine = [name for name in trained if name in held]
            with mesh.allocating():
                self._last = {name: self._part(name).clone() for name in mine}
                self._momentum = {name: torch.zeros_like(self._part(name)) for name in mine}

    def after_step(self, steps: int, own: Tensor, everybody: Tensor) -> None:
        """Begin and merge the averages that are due after a step.

        Args:
            steps: completed steps.
            own: samples of this replica in the step, or their weight; 0-d.
            everybody: those of all replicas.
        """
        self._own = [each + own for each in self._own]
        self._all = [each + everybody for each in self._all]
        self._merge(steps)
        number = averaged_after(steps, self._strategy.local, self._strategy.fragments)
        if number is not None:
            self._send(number, steps)
            self._merge(steps)

    def settle(self) -> None:
        """Merge all averages that are on their way, before they are due."""
        for sent in self._sent.values():
            self._take(sent)
        self._sent.clear()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let parameters and floating point buffers have their means over the replicas inside the block."""
        before: dict[str, Tensor] = {}
        for number, names in enumerate(self._fragments):
            before |= {name: self._part(name).clone() for name in names}
            for handle, flat, message in self._reduced(number):
                self._write(_wait(handle, flat), message)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    self._part(name).copy_(tensor)

    def average_gradients(self, parameters: Mapping[str, nn.Parameter], own: Tensor, everybody: Tensor) -> None:
        """Give the parameters the mean of the replicas' gradients; those that no replica used keep none.

        Args:
            parameters: trained parameters held here.
            own: weight of this replica, 0-d.
            everybody: weight of all replicas, 0-d.
        """
        used = torch.tensor([float(each.grad is not None) for each in parameters.values()], device=self._mesh.device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._group)
        factor = self._factor(own, everybody)
        for parameter, by_any in zip(parameters.values(), used.tolist(), strict=True):
            if not by_any:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = local(parameter.grad)
            sent = gradient.to(self._mesh.device) * factor.to(gradient.dtype)
            dist.all_reduce(sent, group=self._group)
            gradient.copy_(sent)

    def mean_pieces(self, pieces: Sequence[TensorPiece]) -> list[TensorPiece]:
        """Return the means of pieces over the replicas, which the first one writes, on the CPU.

        A piece that only some replicas have is the mean over these. What is not floating point is the first one's.
        """
        mine = {piece.name: piece for piece in pieces}
        described = [[p.name, list(p.local.shape), str(p.local.dtype).removeprefix("torch.")] for p in pieces]
        everybody = gather_json(described, self._group, self._mesh.device)
        known = {name: (tuple(shape), getattr(torch, dtype)) for each in everybody for name, shape, dtype in each}
        found = []
        for name in sorted(known):
            holders = [rank for rank, each in enumerate(everybody) if name in {row[0] for row in each}]
            mean = self._mean_of(mine.get(name), *known[name], holders)
            if name in mine:
                piece = mine[name]
                writes = piece.writes and self._group.rank() == holders[0]
                found.append(TensorPiece(name, mean.cpu(), piece.layout, writes))
        return found

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the outer optimizer that are held here."""
        return [*self._last.values(), *self._momentum.values()]

    def outer_pieces(self) -> list[TensorPiece]:
        """Return the pieces `outer/<parameter>/last` and `.../momentum`, which are equal on all replicas."""
        first = self._group.rank() == 0
        return [
            TensorPiece(f"outer/{name}/{kind}", tensor, self._held[name].layout, self._held[name].writes and first)
            for kind, tensors in (("last", self._last), ("momentum", self._momentum))
            for name, tensor in tensors.items()
        ]

    def counts(self) -> dict[str, Any]:
        """Return the numbers of a checkpoint: the samples since the last average, by replica and fragment."""
        own = gather_json([float(each) for each in self._own], self._group, self._mesh.device)
        return {"replicas": self._group.size(), "outer": self._strategy.outer, "samples": own}

    def load_counts(self, saved: Mapping[str, Any], *, exactly: bool) -> None:
        """Go on from the tensors that have been read.

        Args:
            saved: result of `counts`; empty if the checkpoint is of no local steps.
            exactly: whether each replica has read its own tensors; else all have read the means.
        """
        samples = saved.get("samples", [])
        rows = [list(map(float, row)) for row in samples] if exactly else []
        if rows and all(len(row) == len(self._fragments) for row in rows):
            mine = rows[self._group.rank()]
            self._own = [self._number(each) for each in mine]
            self._all = [self._number(sum(column)) for column in zip(*rows, strict=True)]
        if self._last and saved.get("outer") != self._strategy.outer:  # the outer optimizer begins here
            with torch.no_grad():
                for name, tensor in self._last.items():
                    tensor.copy_(self._part(name))

    # ---- one average ------------------------------------------------------------------------------------------------

    def _send(self, number: int, steps: int) -> None:
        names, delay = self._fragments[number], self._strategy.delay
        before = {name: self._part(name).clone() for name in names} if delay else {}
        self._sent[number] = _Sent(steps + delay, tuple(self._reduced(number)), before)
        self._own[number] = self._all[number] = self._number(0.0)

    def _merge(self, steps: int) -> None:
        for number in [number for number, sent in self._sent.items() if sent.due <= steps]:
            self._take(self._sent.pop(number))

    @torch.no_grad()
    def _take(self, sent: _Sent) -> None:
        for handle, flat, names in sent.messages:
            means = self._split(_wait(handle, flat), names)
            for name, mean in means.items():
                part = self._part(name)
                new = self._outer_step(name, mean.to(part.device)) if name in self._last else mean.to(part.device)
                part.copy_(new + (part - sent.before[name]) if sent.before else new)

    def _outer_step(self, name: str, mean: Tensor) -> Tensor:
        """Take a step of the outer optimizer, as `torch.optim.SGD(..., nesterov=True)` does; return the parameter."""
        last, momentum = self._last[name], self._momentum[name]
        gradient = last - mean
        momentum.mul_(MOMENTUM).add_(gradient)
        return last.sub_(gradient.add_(momentum, alpha=MOMENTUM), alpha=LEARNING_RATE)

    @torch.no_grad()
    def _reduced(self, number: int) -> Iterator[tuple[Any, Tensor, tuple[str, ...]]]:
        """Start the messages that average a fragment, one per dtype."""
        names = self._fragments[number]
        factor = self._factor(self._own[number], self._all[number])
        for dtype in dict.fromkeys(self._part(name).dtype for name in names):
            message = tuple(name for name in names if self._part(name).dtype == dtype)
            flat = torch.cat([self._part(name).reshape(-1).to(self._mesh.device) for name in message])
            flat.mul_(factor.to(dtype))
            yield dist.all_reduce(flat, group=self._group, async_op=True), flat, message

    def _factor(self, own: Tensor, everybody: Tensor) -> Tensor:
        """Return the share of this replica in a mean, 0-d: equal shares if none has trained on anything."""
        return torch.where(everybody > 0, own / everybody, 1.0 / self._group.size())

    def _mean_of(
        self, piece: TensorPiece | None, shape: tuple[int, ...], dtype: torch.dtype, holders: Sequence[int]
    ) -> Tensor:
        device = self._mesh.device
        if not dtype.is_floating_point:
            return torch.empty(0) if piece is None else piece.local
        here = torch.zeros(shape, dtype=dtype, device=device) if piece is None else piece.local.detach().to(device)
        mean = here / len(holders)
        dist.all_reduce(mean, group=self._group)
        return mean

    def _write(self, flat: Tensor, names: Sequence[str]) -> None:
        with torch.no_grad():
            for name, mean in self._split(flat, names).items():
                self._part(name).copy_(mean)

    def _split(self, flat: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        parts = [self._part(name) for name in names]
        cut = torch.split(flat, [part.numel() for part in parts])
        return {name: mean.view_as(part) for name, mean, part in zip(names, cut, parts, strict=True)}

    def _part(self, name: str) -> Tensor:
        """Return the part of a tensor that is held here; the first forward pass may have moved it."""
        return local(self._held[name].tensor)

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._mesh.device)


def _wait(handle: Any, flat: Tensor) -> Tensor:
    handle.wait()
    return flat


def _fragments(held: Mapping[str, TensorPlacement], trained: Mapping[str, nn.Parameter], count: int) -> list[list[str]]:
    """Return the names of the tensors of each fragment that are held here; buffers belong to the first one.

    A parameter is in one fragment under every strategy: they are cut by the sizes of whole parameters.

    Raises:
        StrategyError: there are more fragments than parameters.
    """
    names = list(trained)
    if count > len(names):
        raise StrategyError(
            f"fragments={count}: the model has {len(names)} trained parameters: use {len(names)} or fewer"
        )
    cut = cut_fragments([trained[name].nbytes for name in names], count)
    found = [[names[index] for index in each if names[index] in held] for each in cut]
    found[0] += [
        name
        for name, each in held.items()
        if not isinstance(each.tensor, nn.Parameter) and each.tensor.is_floating_point()
    ]
    return found
