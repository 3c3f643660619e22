"""Memory and host time of a worker beside its tensors and kernels, measured by small trainings of each program kind.

On a CPU a worker's memory is that of its process: Python, torch, the modules and data of a kind of program (the graph
of a step, for example), and the gaps that the allocator leaves between tensors. On a GPU it is that of its tensors, and
of the workspaces that cuBLAS takes at its first call and never gives back.

Their step times also give the host's overheads beside kernels and messages, see `run.calibration.trials`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from shardwise.cluster.measure.patience import Patience
from shardwise.cluster.measure.team import Team
from shardwise.cluster.measure.timer import spread
from shardwise.options import FULL, SELECTIVE
from shardwise.parallel.mesh import default_device
from shardwise.parallel.program import Program
from shardwise.run.calibration.trials import HEADS, PLAIN, Footprint, FootprintTrial, large, small, usual
from shardwise.run.training.job import Job, Options
from shardwise.run.training.process_memory import give_back, own_memory, restart_peak
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.data import Share
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

STEPS = 7
"""Steps of a training whose memory is measured: enough for some of them to be profiled, as in every run."""

WARM, TIMED, TURNS = 5, 40, 8
"""Warm-up steps of a timed training, steps after them, and the turns in which it takes them."""

SECONDS, FEWEST = 3.0, 3
"""Seconds that a training is timed for at most, about, and least number of its turns or repeats, if it is slow."""

LONG = TURNS
"""Timed steps of the large training, whose steps take a few tenths of a second."""


def footprint(seconds: float = 0.0) -> Footprint:
    """Measure small trainings with each kind of program. Collective.

    It must run in a fresh process: modules and memory of earlier work would be counted too.

    Args:
        seconds: time for repeats of trainings that other programs disturb.
    """
    team = Team(default_device())
    patience = Patience(team, seconds)
    busy, strategy = large(team.size, gpu=team.device.type == "cuda"), Strategy(dp=team.size)
    if not _restart_peak(team.device):
        return Footprint({}, busy, FootprintTrial(strategy, 0.0), 0, {})
    workers = team.size
    tiny = small(workers)
    found = {"module": _peak(team, tiny, Strategy(dp=workers))}
    plain = settled(team.device)
    splits = {PLAIN: Strategy(dp=workers)}
    if workers > 1:
        found["sharded"] = _peak(team, tiny, Strategy(fsdp=workers))
        residue = max(0, settled(team.device) - plain)
        splits["sharded"] = Strategy(fsdp=workers)
        splits["stage"] = Strategy(pp=workers, microbatches=2 * workers)
        found["graph"] = _peak(team, tiny, splits["stage"]) - residue
        if HEADS % workers == 0:
            splits["exchange"] = Strategy(tp=workers)
    splits["again"] = Strategy(dp=workers, recompute=FULL)
    splits["selective"] = Strategy(dp=workers, recompute=SELECTIVE)
    process = _largest(team, found)
    before = settled(team.device)
    grown = _largest(team, {"": _peak(team, busy, strategy) - before})[""]
    trained = patience.kept(lambda: _tried(team, {PLAIN: (busy, strategy)}, LONG))[PLAIN]
    model = usual(workers)
    trials = patience.kept(lambda: _tried(team, {name: (model, split) for name, split in splits.items()}, TIMED))
    trials["step"] = patience.kept(lambda: _trained(team, tiny, Strategy(dp=workers)))
    return Footprint(process, busy, trained, grown, trials, busy=patience.busy)


def crowded_step(seconds: float = 0.0) -> tuple[FootprintTrial, float] | None:
    """Time a training by more workers than the host has cores. Collective. Returns None on a GPU.

    Args:
        seconds: time for repeats if other programs disturb it.

    Returns:
        The training, and the cores that other programs used meanwhile.
    """
    team = Team(default_device())
    if team.device.type != "cpu":
        return None
    patience = Patience(team, seconds)
    run = usual(team.size), Strategy(dp=team.size)
    return patience.kept(lambda: _tried(team, {PLAIN: run}, TIMED))[PLAIN], patience.busy


def _trained(team: Team, workload: Workload, strategy: Strategy) -> FootprintTrial:
    """Time the steps of FEWEST whole trainings, which also load batches, check and record their steps. Collective."""
    job = Job(source=Source(workload=workload), strategy=strategy, options=Options(steps=TIMED, quiet=True))
    took = []
    for _ in range(FEWEST):
        mine = train(Program.build(workload, strategy), job).summary["step_seconds"]
        took += team.most([mine or 0.0])  # the first worker times the steps
    return FootprintTrial(strategy, statistics.median(took), spread(took), workload.batch_size)


def _tried(team: Team, wanted: Mapping[str, tuple[Workload, Strategy]], count: int) -> dict[str, FootprintTrial]:
    """Time `count` steps of each training after a warm-up, in turns. Collective.

    A machine may become slower or faster meanwhile: the seconds of a training are the median of its ratios to the first
    training in the same turn, times the median of the first one. Of several workers the slowest counts.
    """
    runs = {name: _Run.warm(team, *each, count) for name, each in wanted.items()}
    for _ in range(max(FEWEST, min(TURNS, int(SECONDS / max(run.seconds for run in runs.values()))))):
        for run in runs.values():
            run.turn()
    by_turn = {name: team.most([statistics.median(turn) for turn in run.turns]) for name, run in runs.items()}
    first = next(iter(by_turn.values()))
    middle = statistics.median(first)
    found = {}
    for name, seconds in by_turn.items():
        workload, strategy = wanted[name]
        ratio = statistics.median(mine / beside for mine, beside in zip(seconds, first, strict=True))
        scatter = team.most([spread([step for turn in runs[name].turns for step in turn])])[0]
        found[name] = FootprintTrial(strategy, middle * ratio, scatter, workload.batch_size)
    return found


@dataclass
class _Run:
    """One training that is timed in turns with others; slow steps, as over slow network links, are fewer in a turn.

    Attributes:
        program: its program.
        share: this worker's share of one batch, which every step trains on.
        steps: steps in a turn.
        seconds: seconds of its second step on the slowest worker.
        turns: seconds of each step, by turn.
    """

    program: Program
    share: Share
    steps: int = 2
    seconds: float = 0.0
    turns: list[list[float]] = field(default_factory=list)

    @classmethod
    def warm(cls, team: Team, workload: Workload, strategy: Strategy, count: int) -> _Run:
        """Build the program of a training and take its first steps. Collective."""
        program = Program.build(workload, strategy)
        if team.device.type == "cuda":  # a host that never waited for the device would be timed alone
            program.ask_before_update(lambda loss, square, search: True)
        run = cls(program, next(program.loader().shares(0)))
        run.turn()
        run.seconds = team.most([run.turns.pop()[-1]])[0]
        if run.seconds * WARM < SECONDS:
            run.steps = WARM - 2
            run.turn()
            run.turns.clear()
        run.steps = max(1, min(count, int(SECONDS / run.seconds)) // TURNS)
        return run

    def turn(self) -> None:
        """Take the steps of a turn, and note their seconds."""
        took = []
        for _ in range(self.steps):
            start = time.perf_counter()
            self.program.step_share(self.share)
            took.append(time.perf_counter() - start)
        self.turns.append(took)


def _largest(team: Team, found: Mapping[str, int]) -> dict[str, int]:
    most = team.most([float(value) for value in found.values()])
    return {kind: int(value) for kind, value in zip(found, most, strict=True)}


def _peak(team: Team, workload: Workload, strategy: Strategy) -> int:
    """Return the peak memory of this process in a short training, in bytes. Collective."""
    settled(team.device)
    _restart_peak(team.device)
    job = Job(source=Source(workload=workload), strategy=strategy, options=Options(steps=STEPS, quiet=True))
    most = train(Program.build(workload, strategy), job).summary["memory_bytes_by_worker"]
    return int(most[team.rank])


def settled(device: torch.device) -> int:
    """Return the memory of this process, or of its tensors on a GPU, in bytes, after all free memory is given back."""
    give_back()
    if device.type != "cuda":
        return own_memory()[1]
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _restart_peak(device: torch.device) -> bool:
    """Reset the peak memory of this process, or of its tensors on a GPU. Returns False if the system cannot."""
    if device.type != "cuda":
        return restart_peak()
    torch.cuda.reset_peak_memory_stats(device)
    return True
