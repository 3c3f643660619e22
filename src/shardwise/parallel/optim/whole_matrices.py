"""Updates that need whole matrices: each matrix of which workers hold parts is dealt out whole to one of them.

every step   parts of gradient and parameter -> its owner       one all-to-all
             the owner updates the whole matrix                 its optimizer state is there, and nowhere else
             parts of the result -> those that hold them        one all-to-all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.mesh import Allocating
from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.gather import gather_json, layout_from_json, layout_to_json
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.splitting.ownership import assign_owners


class WholeMatrices:
    """Matrices that workers of a group hold parts of, each of which one of the workers updates whole.

    Args:
        parameters: the parameters by name; equal names in equal order on all workers of the group.
        held: where the part of each lies on this worker.
        group: workers that together hold all parts.
        device: device that messages are sent from.
        allocating: see `Mesh`.

    Attributes:
        mine: whole parameters that this worker updates, by name.
        written: names of the parameters of which a worker of the group writes its part.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        held: Mapping[str, TensorPlacement],
        group: dist.ProcessGroup,
        device: torch.device,
        allocating: Allocating = nullcontext,
    ) -> None:
        self._parameters, self._group, self._device = dict(parameters), group, device
        owners = assign_owners({name: prod(held[name].layout.shape) for name in parameters}, group.size())
        described = [[layout_to_json(held[name].layout), held[name].writes] for name in parameters]
        tables = gather_json(described, group, device)
        self._layouts = [
            {name: layout_from_json(layout) for name, (layout, _) in zip(parameters, table, strict=True)}
            for table in tables
        ]
        self.written = {name for table in tables for name, (_, writes) in zip(parameters, table, strict=True) if writes}
        self._of = [[name for name in parameters if owners[name] == rank] for rank in range(group.size())]
        with allocating():
            self.mine = {name: self._empty(name) for name in self._of[group.rank()]}
            self._collect([self._parameters], [self.mine])

    def _empty(self, name: str) -> nn.Parameter:
        part = local(self._parameters[name])
        shape = self._layouts[self._group.rank()][name].shape
        return nn.Parameter(torch.empty(shape, dtype=part.dtype, device=part.device))

    def collect(self) -> None:
        """Bring the current gradients and values of all matrices to their owners. Collective over the group."""
        mine, given = self._parameters, {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        zeros = {name: torch.zeros_like(local(p)) for name, p in mine.items() if name not in given}
        wholes = {name: torch.empty_like(whole, requires_grad=False) for name, whole in self.mine.items()}
        self._collect([mine, {**given, **zeros}], [self.mine, wholes])
        for name, whole in self.mine.items():
            whole.grad = wholes[name] if name in given else None

    def _collect(self, parts: Sequence[Mapping[str, Tensor]], wholes: Sequence[Mapping[str, Tensor]]) -> None:
        rank = self._group.rank()
        for dtype in self._dtypes():
            names = [self._names(owner, dtype) for owner in range(len(self._of))]
            sent = [[local(each[name]) for name in owned for each in parts] for owned in names]
            places = [
                [(layouts[name], each[name]) for name in names[rank] for each in wholes] for layouts in self._layouts
            ]
            received = self._exchange(sent, [[layout for layout, _ in some] for some in places], dtype)
            for some, pieces in zip(places, received, strict=True):
                for (layout, whole), piece in zip(some, pieces, strict=True):
                    layout.paste(piece, whole.detach())

    def scatter(self) -> None:
        """Bring the updated parts to all workers that hold them. Collective over the group."""
        rank = self._group.rank()
        for whole in self.mine.values():
            whole.grad = None
        for dtype in self._dtypes():
            names = [self._names(owner, dtype) for owner in range(len(self._of))]
            sent = [[layouts[name].cut(self.mine[name].detach()) for name in names[rank]] for layouts in self._layouts]
            here = self._layouts[rank]
            received = self._exchange(sent, [[here[name] for name in owned] for owned in names], dtype)
            for owned, pieces in zip(names, received, strict=True):
                for name, piece in zip(owned, pieces, strict=True):
                    local(self._parameters[name]).copy_(piece)

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Layout]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send tensors to each worker, and return those from each, in the shapes of the `expected` layouts."""
        flat = [part.reshape(-1) for some in sent for part in some]
        message = torch.cat(flat).to(self._device) if flat else torch.empty(0, dtype=dtype, device=self._device)
        counts = [sum(prod(layout.local_shape) for layout in some) for some in expected]
        received = torch.empty(sum(counts), dtype=dtype, device=self._device)
        sizes = [sum(part.numel() for part in some) for some in sent]
        dist.all_to_all_single(received, message, counts, sizes, group=self._group)
        parts = iter(torch.split(received, [prod(layout.local_shape) for some in expected for layout in some]))
        return [[next(parts).view(layout.local_shape) for layout in some] for some in expected]

    def _dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(parameter.dtype for parameter in self._parameters.values()))

    def _names(self, owner: int, dtype: torch.dtype) -> list[str]:
        return [name for name in self._of[owner] if self._parameters[name].dtype == dtype]
