"""Reference training: the plain small training of a calibration, taken again to see how fast the machine is now.

A machine is not always as fast as while it was measured: its clock, its temperature and other programs change within
minutes. The reference takes turns with the trainings of a comparison. The ratio of its step time to that of the
calibration is the pace of the machine: 1.2 says that what took 1 s then takes 1.2 s now.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from shardwise.cluster.cluster import Device
from shardwise.launch import gate, watch
from shardwise.launch.join import threads_per_worker
from shardwise.parallel.program import Program
from shardwise.run.calibration.trials import usual
from shardwise.run.training.job import Job, Options
from shardwise.run.training.process_memory import peak_memory
from shardwise.run.training.result import Step, Trained
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

SLICE_STEPS = 5
"""Steps of a turn, as in a calibration (`footprint.TIMED` / `footprint.TURNS`)."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference training of a measured device.

    Attributes:
        seconds: seconds of its step while the device was measured.
        workers: number of its workers.
    """

    seconds: float
    workers: int

    @classmethod
    def of(cls, device: Device) -> Reference | None:
        """Return that of a device. Returns None if it was not measured with one, or is a GPU, whose steps take none."""
        if device.reference_seconds is None or device.kind != "cpu":
            return None
        return cls(device.reference_seconds, device.reference_workers)

    def job(self, turns: int) -> Job:
        """Return the job that takes this number of turns of SLICE_STEPS steps."""
        strategy = Strategy(dp=self.workers)
        return Job(
            source=Source(workload=usual(self.workers)),
            strategy=strategy,
            options=Options(steps=turns * SLICE_STEPS, quiet=True),
            slice_steps=SLICE_STEPS,
        )

    def pace(self, steps: Sequence[float]) -> float | None:
        """Return the pace of the machine from the step times of turns, in seconds. Returns None without any."""
        return statistics.median(steps) / self.seconds if steps else None


def train_reference(job: Job) -> Trained:
    """Train the reference in each of its workers; the batch is the same in each step. Collective."""
    torch.set_num_threads(threads_per_worker(job.strategy.workers))
    with watch.watching(watch.limits(None, None)):
        program = Program.build(job.source.load(), job.strategy)
        share = next(program.loader().shares(0))
        steps: list[Step] = []
        total = job.options.steps or 0
        while len(steps) < total:
            if len(steps) % SLICE_STEPS == 0:
                told = [asdict(step) for step in steps[-SLICE_STEPS:]]
                gate.pass_gate({"steps": told, "peak_bytes": peak_memory(program.mesh.device), "notes": []})
            start = time.perf_counter()
            program.step_share(share)
            seconds = time.perf_counter() - start
            steps.append(Step(len(steps) + 1, 0, 0.0, None, None, share.samples, seconds))
            watch.beat()
        return Trained({"memory_bytes": peak_memory(program.mesh.device)}, tuple(steps), {})
