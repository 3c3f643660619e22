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

import torch

from shardwise.cluster.measure.patience import Patience
from shardwise.cluster.measure.team import Team
from shardwise.cluster.measure.timer import spread
from shardwise.options import FULL, SELECTIVE
from shardwise.parallel.mesh import default_device
from shardwise.parallel.program import Program
from shardwise.run.calibration.trials import HEADS, Footprint, FootprintTrial, large, small, usual
from shardwise.run.training.job import Job, Options
from shardwise.run.training.process_memory import give_back, own_memory, restart_peak
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

STEPS = 7
"""Steps of a training whose memory is measured: enough for some of them to be profiled, as in every run."""

WARM, TIMED = 5, 20
"""Warm-up steps of a timed training, and steps after them whose median is taken."""

SECONDS, FEWEST = 3.0, 3
"""Seconds that a training is timed for at most, about, and least number of steps."""

LONG = 6
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
    splits = {"step": Strategy(dp=workers)}
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
    trained = patience.kept(lambda: _tried(team, busy, strategy, LONG))
    model = usual(workers)
    trials = {
        name: patience.kept(lambda split=split: _tried(team, model, split, TIMED))  # type: ignore[misc]
        for name, split in splits.items()
    }
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
    model = usual(team.size)
    return patience.kept(lambda: _tried(team, model, Strategy(dp=team.size), TIMED)), patience.busy


def _tried(team: Team, workload: Workload, strategy: Strategy, count: int) -> FootprintTrial:
    """Time `count` steps of a training after a warm-up, and take the median of the slowest worker. Collective.

    Slow steps, as over slow network links, are timed fewer times, in about SECONDS.
    """
    program = Program.build(workload, strategy)
    if team.device.type == "cuda":  # a host that never waited for the device would be timed alone
        program.ask_before_update(lambda loss, square, search: True)
    share = next(program.loader().shares(0))

    def steps(number: int) -> list[float]:
        took = []
        for _ in range(number):
            start = time.perf_counter()
            program.step_share(share)
            took.append(time.perf_counter() - start)
        return took

    def most(value: float) -> float:
        return max(row[0] for row in team.gathered([value]))

    one = most(steps(2)[-1])
    steps(WARM - 2 if one * WARM < SECONDS else 0)
    took = steps(max(FEWEST, min(count, int(SECONDS / one))))
    return FootprintTrial(strategy, most(statistics.median(took)), most(spread(took)), workload.batch_size)


def _largest(team: Team, found: Mapping[str, int]) -> dict[str, int]:
    by_rank = team.gathered([float(value) for value in found.values()])
    return {kind: int(max(column)) for kind, column in zip(found, zip(*by_rank, strict=True), strict=True)}


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
