"""Seam between a command and the launcher that runs it on several workers.

    command ── launch ── Launcher ── RunningJob ──▶ rank 0  python -m shardwise train ...
                                               └──▶ rank 1  python -m shardwise train ...

Every worker runs the command that the user gave, less the options that name the launcher. It learns its rank from its
environment (`launch.context`). `launch` starts the job, passes on a signal, and ends what is left of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from shardwise.errors import RequestError
from shardwise.launch.exit import die_with_parent
from shardwise.launch.signals import Signals, Terminated

LOOK_SECONDS = 0.05
"""Seconds between two looks at a job."""

SPARE_SECONDS = 10.0
"""Seconds beyond the grace of a run that a job gets to end once it is told to."""

ENDING_SECONDS = 15.0
"""Seconds that a launcher gets to end its workers before it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """Job to start.

    Attributes:
        arguments: arguments of `shardwise` for each worker.
        workers: number of workers.
        hosts: hosts to run on; empty: those that the launcher chooses.
        grace: seconds that the workers have to write a checkpoint once they are told to end.
        image: container image of the workers, for launchers that start containers.
        environment: environment of this process.
    """

    arguments: tuple[str, ...]
    workers: int
    hosts: tuple[str, ...] = ()
    grace: float = 0.0
    image: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> tuple[str, ...]:
        """Return the command line of each worker."""
        return (sys.executable, "-m", "shardwise", *self.arguments)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Allocation of a scheduler.

    Attributes:
        workers: number of workers that it was made for.
        nodes: workers of each node, in the order of the ranks; empty if the scheduler does not say.
    """

    workers: int
    nodes: tuple[int, ...]


class RunningJob(Protocol):
    """Job that a launcher has started. Its workers write to this process's standard output and error."""

    def poll(self) -> int | None:
        """Return the exit status of the job, that of a worker that failed. Returns None while it runs."""

    def stop(self) -> None:
        """Tell all workers to write a checkpoint and end."""

    def kill(self) -> None:
        """End all workers at once, and wait until they are gone; does nothing if they have ended."""


class Launcher(Protocol):
    """Launcher of jobs on several workers."""

    @property
    def name(self) -> str:
        """Return the name by which users choose it."""

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return the allocation that this process is in. Returns None if it is in none."""

    def check(self, asked: LaunchRequest) -> None:
        """Check a job before anything starts. Raises RequestError."""

    def start(self, asked: LaunchRequest) -> RunningJob:
        """Start the job."""

    def script(self, asked: LaunchRequest) -> str:
        """Return the file that starts the job later. Raises RequestError if this launcher has none."""


def launch(launcher: Launcher, asked: LaunchRequest) -> int:
    """Run a job to its end, and return its exit status: 0, 1 or 2, as `shardwise` itself has it.

    Raises:
        RequestError: the launcher cannot start it; found before anything starts.
        KeyboardInterrupt: Ctrl-C; all workers have been ended.
        Terminated: this process was told to end; the workers wrote a checkpoint or had no time to.
    """
    launcher.check(asked)
    with Signals() as signals:
        job = launcher.start(asked)
        try:
            status = _attend(job, signals, asked.grace)
        finally:
            signals.mute()
            job.kill()
    return status if status in (0, 1, 2) else 1


def _attend(job: RunningJob, signals: Signals, grace: float) -> int:
    """Wait until the job has ended, pass on a signal, and return the job's exit status. Raises Terminated."""
    told = 0.0
    while (status := job.poll()) is None:
        if signals.stop and not told:
            told = time.monotonic()
            job.stop()
        if told and (signals.again or time.monotonic() > told + grace + SPARE_SECONDS):
            raise Terminated(128 + signals.stop)
        time.sleep(LOOK_SECONDS)
    if signals.stop and status:
        raise Terminated(128 + signals.stop)
    return status


class ProcessJob:
    """Job of a launcher that is a program, such as mpirun.

    Args:
        command: command line of the launcher.
        environment: its environment.
        stop: signal that it takes as, or passes on as, the request to end after a checkpoint.
        end: signal upon which it ends all workers at once.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stop: signal.Signals = signal.SIGTERM,
        end: signal.Signals = signal.SIGTERM,
    ) -> None:
        self._stop, self._end = stop, end
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends the job
            preexec_fn=partial(die_with_parent, end),
        )

    def poll(self) -> int | None:
        """Return the launcher's exit status. Returns None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Tell all workers to write a checkpoint and end."""
        self._process.send_signal(self._stop)

    def kill(self) -> None:
        """End all workers at once, and wait until the launcher is gone."""
        if self._process.poll() is None:
            self._process.send_signal(self._end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def not_installed(engine: str, program: str, package: str) -> RequestError:
    """Return the error of a launcher whose program is not there."""
    return RequestError(f"engine {engine}: {program} is not installed: install {package}, or leave out --engine")


def no_script(engine: str) -> RequestError:
    """Return the error of a launcher that has no file which starts a job later."""
    return RequestError(f"engine {engine} has no script to write: leave out --dry-run (slurm and kubernetes have one)")


def no_hosts(engine: str, remedy: str) -> RequestError:
    """Return the error of a launcher that is not told its hosts by --hosts."""
    return RequestError(f"engine {engine} takes no --hosts: {remedy}")


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Return whether an option is among the arguments of a command."""
    return any(each == option or each.startswith(f"{option}=") for each in arguments)
