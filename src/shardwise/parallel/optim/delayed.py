"""State of a training whose updates use the gradient of the step before (`schedule=pipedream`), between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.engine import Engine
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline.stream import PipelineStream
from shardwise.parallel.state.gather import gather_json
from shardwise.parallel.state.layout import TensorPiece
from shardwise.workload.data import Share

GRADIENT = "delayed"
"""Beginning of the names of gradients that no update has used yet, and entry of a program's state about them."""


@dataclass(frozen=True, slots=True)
class TakenStep:
    """Step whose gradient no update has used yet.

    Attributes:
        loss: this worker's part of its loss.
        losses: this worker's parts of several losses by name, else empty.
        share, scales: samples of the step, and the factors of their losses; None after a checkpoint.
    """

    loss: Tensor
    losses: Mapping[str, Tensor]
    share: Share | None = None
    scales: Sequence[Tensor] = ()


class DelayedGradient:
    """The gradient that the next update uses, with the numbers that are reported then.

    Attributes:
        last: the step that it is of; None before the first one.
    """

    def __init__(self, engine: Engine, mesh: Mesh, stream: PipelineStream) -> None:
        self.last: TakenStep | None = None
        self.stream = stream
        self._engine, self._mesh = engine, mesh

    def pieces(self) -> list[TensorPiece]:
        """Return the piece `delayed/<parameter>` of each gradient: zeros before the first step. Collective."""
        self.stream.drain()
        held = self._engine.held
        found = self.stream.versions.fill_pending() if self.last is None else self.stream.versions.pending()
        return [
            TensorPiece(f"{GRADIENT}/{name}", each, held[name].layout, held[name].writes)
            for name, each in found.items()
            if each is not None
        ]

    def counts(self) -> dict[str, Any]:
        """Return the losses that the next step reports, and the names of the gradients, JSON-able. Collective."""
        if self.last is None:
            return {}
        losses = torch.stack([self.last.loss.double(), *(each.double() for each in self.last.losses.values())])
        mine = [name for name, each in self.stream.versions.pending().items() if each is not None]
        names: list[list[str]] = [mine]
        if self._mesh.world is not None:
            dist.all_reduce(losses, group=self._mesh.world)
            names = gather_json(mine, self._mesh.world, self._mesh.device)
        return {
            "losses": losses.tolist(),
            "of": list(self.last.losses),
            "names": sorted({name for each in names for name in each}),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from the tensors that have been read and the result of `counts`; it is empty for other schedules."""
        self.stream.versions.keep_pending(frozenset(saved.get("names", ())))
        if not saved:
            self.last = None
            return
        mine = float(self._mesh.rank == 0)
        losses = [torch.tensor(each * mine, dtype=torch.float64, device=self._mesh.device) for each in saved["losses"]]
        self.last = TakenStep(losses[0], dict(zip(saved["of"], losses[1:], strict=True)))
