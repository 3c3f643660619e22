"""Spark: the launcher `--engine spark`. One task of a barrier-mode job a worker, each with a process of its own.

    driver ── barrier job ──┬── task ── python -m shardwise train ...   rank 0
       └──── one socket ────┼── task ── python -m shardwise train ...   rank 1
             for each task ─┘   lines and exit status up, signals down, as JSON

The master is `--hosts spark://host:7077`, or what spark-defaults.conf or PYSPARK_SUBMIT_ARGS say; without one, Spark
runs in this process's own JVM, on the loopback device. The driver hears a task only after it has sent the job's token.

Source: https://spark.apache.org/docs/latest/api/python/reference/api/pyspark.BarrierTaskContext.html
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from shardwise.errors import RequestError
from shardwise.launch.engines.member import Member, Roll, member_environment, shared_environment
from shardwise.launch.launcher import Allocation, LaunchRequest, no_script, not_installed
from shardwise.launch.ranks import LOOPBACK

SLOTS_SECONDS = 60.0
"""Seconds to wait for the cluster's executors to have a slot for each worker."""

LOOK_SECONDS = 0.05
"""Seconds between two looks of a task at its process."""

REACH_SECONDS = 10.0
"""Seconds that a master may take to accept a connection, and a job to end."""

ALL_CORES = "local[*]"
"""Master of Spark if the user names none: as many slots in this process's JVM as the host has cores."""

GREETING_BYTES = 1000
"""Longest first line of a task, in bytes."""


class SparkLauncher:
    """Launcher of jobs on a cluster of Spark."""

    name = "spark"

    def allocated(self, environment: Mapping[str, str]) -> Allocation | None:
        """Return None: a cluster is no allocation, it may have other work."""
        return None

    def check(self, asked: LaunchRequest) -> None:
        """Check that Spark is there, its master answers, and its executors have slots. Raises RequestError."""
        _check_installed(asked.environment)
        _check_master(asked.hosts)
        context = _context(asked)
        slots = _slots(context, asked.workers)
        if slots < asked.workers:
            context.stop()
            raise RequestError(
                f"engine spark: the strategy needs {asked.workers} workers, the cluster has {slots} free slots: use "
                f"--workers {slots}, or give Spark more executors"
            )

    def start(self, asked: LaunchRequest) -> SparkJob:
        """Start the job."""
        return SparkJob(asked)

    def script(self, asked: LaunchRequest) -> str:
        """Raise RequestError: Spark starts a job at once."""
        raise no_script(self.name)


def _check_installed(environment: Mapping[str, str]) -> None:
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise not_installed("spark", "pyspark", "it with pip install pyspark") from None
    home = environment.get("JAVA_HOME")
    if shutil.which(str(Path(home, "bin", "java")) if home else "java") is None:
        raise not_installed("spark", "java", "Java 17 or later (Debian: apt-get install default-jre-headless)")


def _check_master(hosts: Sequence[str]) -> None:
    """Check that `--hosts` names one master of Spark, and that it answers. Raises RequestError."""
    if not hosts:
        return
    match = re.fullmatch(r"spark://([^:/]+):(\d+)", hosts[0])
    if match is None or len(hosts) > 1:
        raise RequestError(f"--hosts {','.join(hosts)}: engine spark takes its master alone, spark://host:7077 say")
    try:
        socket.create_connection((match[1], int(match[2])), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"engine spark: {match[1]}:{match[2]} cannot be reached ({error}): nothing was started; start the master, "
            "or name another"
        ) from error


def _context(asked: LaunchRequest) -> Any:
    """Return the Spark context of this process; a new one if there is none yet. Raises RequestError."""
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException

    try:
        SparkContext._ensure_initialized()  # starts the JVM, or else SparkConf does not have the user's settings
        settings = SparkConf()
        if asked.hosts:
            settings.setMaster(asked.hosts[0])
        elif settings.get("spark.master", ALL_CORES) == ALL_CORES:
            settings.setMaster(f"local[{asked.workers}]")
        for name, value in _defaults(asked, str(settings.get("spark.master"))).items():
            settings.setIfMissing(name, value)
        settings.setAppName("shardwise")
        settings.set("spark.ui.showConsoleProgress", "false")  # it writes between the lines of the workers
        settings.set("spark.dynamicAllocation.enabled", "false")  # barrier mode does not work with it
        context = SparkContext.getOrCreate(settings)
    except (PySparkException, RuntimeError) as error:
        raise RequestError(f"engine spark: Spark did not start: {_first_line(error)}") from error
    context.pythonExec = asked.environment.get("PYSPARK_PYTHON", sys.executable)
    return context


def _defaults(asked: LaunchRequest, master: str) -> dict[str, str]:
    """Return settings of Spark that hold unless the user's own say otherwise."""
    settings = {
        "spark.ui.enabled": "false",
        "spark.log.level": "ERROR",
        "spark.cores.max": str(asked.workers),  # of a standalone master, which gives a job all cores otherwise
        "spark.executor.instances": str(asked.workers),  # of other managers
    }
    if master.startswith("local"):
        settings |= {"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK}
    if "PYTHONPATH" in asked.environment:
        settings["spark.executorEnv.PYTHONPATH"] = asked.environment["PYTHONPATH"]
    return settings


def _slots(context: Any, wanted: int) -> int:
    """Return the tasks that can run at once, waiting a while until there are `wanted`. Raises RequestError."""
    from py4j.protocol import Py4JError

    end = time.monotonic() + (0 if context.master.startswith("local") else SLOTS_SECONDS)
    try:
        inner = context._jsc.sc()
        profile = inner.resourceProfileManager().defaultResourceProfile()
        while True:
            slots = int(inner.maxNumConcurrentTasks(profile))
            if slots >= wanted or time.monotonic() >= end:
                return slots
            time.sleep(LOOK_SECONDS)
    except Py4JError as error:  # the master did not take the job: the context has stopped
        raise RequestError(f"engine spark: the cluster does not take the job: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """Return the first line of an error; of one in the JVM, the line after `An error occurred while calling`."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return more[0].lstrip(": ") if more and first.startswith("An error occurred while calling") else first


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """Order of the driver to all tasks, which Spark brings to them.

    Attributes:
        address: address of the driver.
        port: TCP port of the driver.
        token: text that a task sends first, which only this job has.
        command: command line of a worker.
        environment: variables of the driver's environment that workers get.
        folder: working directory of the driver.
    """

    address: str
    port: int
    token: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str


def attend(order: TaskOrder, _: Iterable[Any]) -> Iterator[int]:
    """Run the worker of one task of a barrier job, and yield its exit status; ranks of a host are in a row."""
    from pyspark import BarrierTaskContext

    task = BarrierTaskContext.get()
    found = [info.address.rpartition(":")[0] or info.address for info in task.getTaskInfos()]
    tasks = sorted(range(len(found)), key=lambda index: (found.index(found[index]), index))
    rank, hosts = tasks.index(task.partitionId()), [found[index] for index in tasks]
    beyond = len(set(hosts)) > 1
    member = Member()
    port = max(map(int, task.allGather(str(member.listen(beyond) if rank == 0 else 0))))
    address = hosts[0] if beyond else LOOPBACK
    environment = member_environment(SparkLauncher.name, rank, hosts, address, port, order.environment)
    try:
        with socket.create_connection((order.address, order.port)) as line:
            _send(line, {"token": order.token, "rank": rank})
            member.start(order.command, environment, order.folder)
            yield _report(line, member)
    finally:
        member.kill()


def _report(line: socket.socket, member: Member) -> int:
    """Send the driver what the worker writes and its exit status, pass on signals; return the status."""
    heard = b""
    while True:
        lines, status = member.take()
        if lines or status is not None:
            _send(line, {"lines": lines, "status": status})
        if status is not None:
            return status
        if select.select([line], [], [], LOOK_SECONDS)[0]:
            received = line.recv(4096)
            if not received:  # the driver has ended the job, or is gone
                return 1
            *orders, heard = (heard + received).split(b"\n")
            for order in orders:
                member.send(int(json.loads(order)["signal"]))


def _send(line: socket.socket, value: Mapping[str, Any]) -> None:
    line.sendall(json.dumps(value).encode() + b"\n")


class SparkJob:
    """Barrier-mode job of Spark, which runs in a thread of this process."""

    def __init__(self, asked: LaunchRequest) -> None:
        self._context = _context(asked)
        self._roll = Roll(asked.workers)
        self._reports: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self._lines: dict[int, socket.socket] = {}
        self._hearers: list[threading.Thread] = []
        self._error = ""
        settings = self._context.getConf()
        address = str(settings.get("spark.driver.host", LOOPBACK))
        self._listener = socket.create_server((str(settings.get("spark.driver.bindAddress", address)), 0))
        self._token = secrets.token_hex(16)
        order = TaskOrder(
            address=address,
            port=self._listener.getsockname()[1],
            token=self._token,
            command=asked.command,
            environment=shared_environment(asked.environment),
            folder=os.getcwd(),
        )
        threading.Thread(target=self._welcome, daemon=True).start()
        self._runner = threading.Thread(target=self._run, args=(order, asked.workers), daemon=True)
        self._runner.start()

    def poll(self) -> int | None:
        """Print what the workers have written, and return the job's exit status. Returns None while it runs."""
        over = not self._runner.is_alive()
        with contextlib.suppress(Empty):
            while True:
                rank, report = self._reports.get_nowait()
                if report is None:
                    self._roll.lose(rank, "its task of Spark has ended")
                else:
                    self._roll.note(rank, report["lines"], report["status"])
        status = self._roll.status()
        if status is None and over:
            sys.stderr.write(f"shardwise: the job of Spark has ended early: {self._error}\n")
            return 1
        return status

    def stop(self) -> None:
        """Tell all workers to write a checkpoint and end."""
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                _send(line, {"signal": int(signal.SIGTERM)})

    def kill(self) -> None:
        """End all workers at once, and the context of Spark."""
        self._listener.close()
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._runner.join(REACH_SECONDS)
        self._context.stop()

    def _run(self, order: TaskOrder, workers: int) -> None:
        """Run the job to its end, and wait until what its tasks have sent is heard."""
        try:
            self._context.parallelize(range(workers), workers).barrier().mapPartitions(partial(attend, order)).collect()
        except Exception as error:
            self._error = _first_line(error)
        for hearer in list(self._hearers):
            hearer.join(REACH_SECONDS)

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                line, _ = self._listener.accept()
                self._hearers.append(threading.Thread(target=self._hear, args=(line,), daemon=True))
                self._hearers[-1].start()

    def _hear(self, line: socket.socket) -> None:
        """Pass on the reports of a task that knows the token, and None if it ends without an exit status."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), line, line.makefile("rb") as frames:
            greeting = json.loads(frames.readline(GREETING_BYTES))
            if not hmac.compare_digest(str(greeting["token"]).encode(), self._token.encode()):
                return
            rank, status = int(greeting["rank"]), None
            self._lines[rank] = line
            with contextlib.suppress(OSError):
                for frame in frames:
                    report = json.loads(frame)
                    status = report["status"]
                    self._reports.put((rank, report))
            if status is None:
                self._reports.put((rank, None))
