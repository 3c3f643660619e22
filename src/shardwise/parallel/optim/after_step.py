"""The workload's own function of each parameter after an update: clipping, projections, masks.

One process gives the function whole parameters. A worker that holds a part calls it on that part if this gives the
same, which is tried on random tensors before the training. Else the workers join their parts, call it on the whole, and
each takes its own part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import WorkloadError, blamed
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.gather import describe, gather_json, understand
from shardwise.parallel.state.layout import Layout, TensorPiece, TensorPlacement
from shardwise.parallel.state.pass_state import passes_undone
from shardwise.workload.workload import Workload

SCALES = (1.0, 1e-3, 1e3)
"""Scales of the random tensors, so that a function which acts on large or on small values only is seen to act."""


def changed(workload: Workload, name: str, tensor: Tensor) -> None:
    """Call the workload's function on one parameter, which it changes in place.

    Raises:
        WorkloadError: it fails, or makes a new tensor instead.
    """
    assert workload.after_step is not None
    before, storage = tensor.shape, tensor.untyped_storage().data_ptr()
    with blamed(f"after_step of workload {workload.name!r} fails for {name}"), torch.no_grad():
        result: Any = workload.after_step(name, tensor)
    made = isinstance(result, Tensor) and result.shape == before
    moved = tensor.untyped_storage().data_ptr() != storage or tensor.shape != before
    if moved or (made and result.untyped_storage().data_ptr() != storage):
        raise WorkloadError(
            f"after_step of workload {workload.name!r} makes a new tensor for {name}, which nothing would use: change "
            "the given one in place (clamp_ instead of clamp)"
        )


class AfterStep:
    """Calls of the workload's function for the parameters held on this worker. Every method is collective.

    Args:
        workload: workload with such a function.
        parameters: trained parameters held here, by name.
        held: placement of each on this worker.
        mesh: this worker's position.

    Raises:
        WorkloadError: the function fails, makes new tensors, or draws random numbers.
    """

    def __init__(
        self,
        workload: Workload,
        parameters: Mapping[str, nn.Parameter],
        held: Mapping[str, TensorPlacement],
        mesh: Mesh,
    ) -> None:
        self._workload, self._parameters, self._mesh = workload, parameters, mesh
        self._layouts = {name: held[name].layout for name in parameters}
        self._joined: dict[str, list[tuple[Layout | None, torch.dtype]]] = {}
        if mesh.world is not None:
            with passes_undone(workload, nn.Module()):
                apart = [name for name in parameters if not self._tried(name)]
            self._joined = self._find_joined(apart)

    def __call__(self, names: AbstractSet[str]) -> None:
        """Call the function on every parameter of `names`."""
        for name, parameter in self._parameters.items():
            part = local(parameter)
            if name in names and name not in self._joined and part.numel():
                changed(self._workload, name, part)
        for name, parts in self._joined.items():
            if name in names:
                self._on_whole(name, parts)

    def _tried(self, name: str) -> bool:
        """Return whether the function gives the same on our part of a parameter as on the whole."""
        layout, parameter = self._layouts[name], local(self._parameters[name])
        generator = torch.Generator().manual_seed(self._workload.seed)
        for scale in SCALES:
            values = torch.randn(layout.shape, generator=generator).mul_(scale).to(parameter)
            whole, again, part = values.clone(), values.clone(), layout.cut(values)
            changed(self._workload, name, whole)
            changed(self._workload, name, again)
            if not torch.equal(whole, again):
                raise WorkloadError(
                    f"after_step of workload {self._workload.name!r} gives something else each time for {name}: every "
                    "worker would get its own; draw from a generator that it seeds itself"
                )
            if layout.local_shape != layout.shape and part.numel() and not self._alike(name, part, layout.cut(whole)):
                return False
        return True

    def _alike(self, name: str, part: Tensor, expected: Tensor) -> bool:
        """Return whether the function turns a part into what is expected; one that fails on a part does not."""
        try:
            changed(self._workload, name, part)
        except WorkloadError:
            return False
        return torch.allclose(part, expected, rtol=8 * torch.finfo(part.dtype).eps, atol=0.0, equal_nan=True)

    def _find_joined(self, mine: Sequence[str]) -> dict[str, list[tuple[Layout | None, torch.dtype]]]:
        """Return where each worker holds the parameters that some worker cannot treat alone, by name."""
        assert self._mesh.world is not None
        names = sorted({name for each in gather_json(list(mine), self._mesh.world, self._mesh.device) for name in each})
        described = {
            name: describe(TensorPiece(name, local(self._parameters[name]), self._layouts[name], writes=True))
            for name in names
            if name in self._parameters
        }
        tables = gather_json(described, self._mesh.world, self._mesh.device)
        found: dict[str, list[tuple[Layout | None, torch.dtype]]] = {}
        for name in names:
            known = [None if name not in table else understand(table[name]) for table in tables]
            dtype = next(each[2] for each in known if each is not None)
            found[name] = [(None if each is None else each[1], dtype) for each in known]
        return found

    def _on_whole(self, name: str, parts: Sequence[tuple[Layout | None, torch.dtype]]) -> None:
        sizes = [0 if layout is None else layout.elements for layout, _ in parts]
        device = self._mesh.device
        own = torch.zeros(max(sizes), dtype=parts[0][1], device=device)
        parameter = self._parameters.get(name)
        if parameter is not None:
            own[: sizes[dist.get_rank(self._mesh.world)]] = local(parameter).flatten()
        received = [torch.empty_like(own) for _ in parts]
        dist.all_gather(received, own, group=self._mesh.world)
        if parameter is None:
            return
        layout = self._layouts[name]
        whole = torch.empty(layout.shape, dtype=own.dtype, device=device)
        for (held, _), size, values in zip(parts, sizes, received, strict=True):
            if held is not None:
                held.paste(values[:size].view(held.local_shape), whole)
        changed(self._workload, name, whole)
        with torch.no_grad():
            local(parameter).copy_(layout.cut(whole))


def after_step_of(
    workload: Workload, parameters: Mapping[str, nn.Parameter], held: Mapping[str, TensorPlacement], mesh: Mesh
) -> Callable[[AbstractSet[str]], None]:
    """Return what to call after each update, with the names of the parameters updated. Collective.

    It does nothing if the workload has no such function.
    """
    return (lambda _: None) if workload.after_step is None else AfterStep(workload, parameters, held, mesh)
