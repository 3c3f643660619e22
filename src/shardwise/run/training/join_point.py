"""Point of a training on parameter servers from which all workers go on after a killed one was started again.

The servers have the parameters, the optimizer and the clocks. What a worker knows beside them is noted here after each
step. When the workers meet again, one that was started again takes it over from the one that is furthest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import ShardwiseError
from shardwise.launch import regroup
from shardwise.parallel.program import Program
from shardwise.parallel.state.gather import gather_json
from shardwise.run.training.progress import Progress
from shardwise.run.training.result import NO_STEP, FirstStep


@dataclass(slots=True)
class JoinPoint:
    """Point of a training at which this worker is, as far as the servers do not know it.

    Attributes:
        progress: progress after the last step; None before the first training loop.
        first_step: proof of the first step.
        skipped: number of steps whose update was not applied.
        restarted: workers that were started again: `rank`, the `step` after which it joined, and `left_out`, the
            number of batches whose part of that worker nobody has computed.
        lost: ranks that were killed since the workers met.
    """

    progress: Progress | None = None
    first_step: FirstStep = NO_STEP
    skipped: int = 0
    restarted: list[dict[str, int]] = field(default_factory=list)
    lost: tuple[int, ...] = ()
    _steps: int = 0
    _clock: int = 0
    _numbers: dict[str, Any] = field(default_factory=dict)
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Return one line for each worker that was started again."""
        return [
            f"worker {each['rank']} was killed, and joined again after step {each['step']}"
            + (f"; its part of {each['left_out']} batches was left out" if each["left_out"] else "")
            for each in self.restarted
        ]

    def begin(self, program: Program) -> None:
        """Note what a new program has before its first step."""
        self._versions = {name: each._version for name, each in _buffers(program).items()}

    def note(self, program: Program, progress: Progress, skipped: int) -> None:
        """Note where this worker stands after a step, or after the end of an epoch."""
        self.progress, self.skipped = progress, skipped
        self._steps, self._clock, self._numbers = program.steps, program.clock, program.numbers()
        self._buffers = {
            name: each.clone() for name, each in _buffers(program).items() if each._version != self._versions[name]
        }

    def take(self, program: Program) -> Progress:
        """Let a new program go on where the servers stand, and return its progress. Collective.

        Raises:
            ShardwiseError: no worker knows what belongs to where they stand.
        """
        world, device = program.mesh.world, program.mesh.device
        assert world is not None
        everybody = gather_json(self._shown(program), world, device)
        known = {rank: each for rank, each in enumerate(everybody) if each["progress"] is not None}
        source = max(known, key=lambda rank: _order(known[rank]))
        latest = known[source]
        steps = program.clock - (latest["clock"] - latest["steps"])
        own = known.get(program.mesh.rank, latest)
        chosen = own if own["steps"] == steps != latest["steps"] else latest
        further = steps - chosen["steps"]
        if further not in (0, 1):
            raise ShardwiseError(f"the parameter servers stand at step {steps}, and no worker is there: use --resume")
        program.go_on(chosen["steps"], chosen["numbers"], further)
        progress = Progress(**chosen["progress"])
        self._take_buffers(program, latest["buffers"], source, keep=chosen is not latest)
        self.first_step, self.skipped = FirstStep(**latest["first_step"]), chosen["skipped"]
        joined = [{"rank": r, "step": steps, "left_out": everybody[r]["left_out"]} for r in latest["lost"]]
        self.restarted, self.lost = [*latest["restarted"], *joined], ()
        progress = replace(progress, batch=progress.batch + further)
        self.note(program, progress, self.skipped)
        return progress

    def _shown(self, program: Program) -> dict[str, Any]:
        return {
            "progress": None if self.progress is None else asdict(self.progress),
            "first_step": asdict(self.first_step),
            "skipped": self.skipped,
            "restarted": self.restarted,
            "lost": self.lost,
            "steps": self._steps,
            "clock": self._clock,
            "numbers": self._numbers,
            "buffers": list(self._buffers),
            "left_out": program.left_out,
        }

    def _take_buffers(self, program: Program, names: list[str], source: int, *, keep: bool) -> None:
        """Take over the buffers `names` of worker `source`; with `keep` those of this worker instead. Collective."""
        mine, there = self._buffers, _buffers(program)
        with torch.no_grad():
            for name in names:
                value = mine[name] if program.mesh.rank == source else torch.empty_like(there[name])
                dist.broadcast(value, source)
                there[name].copy_(mine.get(name, value) if keep else value)


def _buffers(program: Program) -> dict[str, Tensor]:
    held = program.engine.held
    return {name: each.tensor.detach() for name, each in held.items() if not isinstance(each.tensor, nn.Parameter)}


def _order(shown: dict[str, Any]) -> tuple[int, int, int]:
    return shown["steps"], shown["progress"]["epoch"], shown["progress"]["batch"]


def can_go_on(program: Program, batches: int | None) -> bool:
    """Return whether a training can go on after a killed worker was started again.

    Its parameters are on servers, no worker has an average of them, and the place of a sample in the data is known.
    """
    return regroup.possible() and program.strategy.ps > 0 and program.workload.average is None and batches is not None
