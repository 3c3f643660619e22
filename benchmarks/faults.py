"""The fault matrix: what happens, how soon, and what is said, when something goes wrong while a run is under way.

Each row is one run of a small workload on local workers (two hosts with a link of their own for `cut`). Rank and step
of the fault are drawn with `--seed`. A row holds if the run ends by itself (or goes on, where it should), with the
right exit status, names the right rank, leaves no process behind, and its checkpoint can be gone on from. Exit status 1
where one does not.

    python -m benchmarks.faults [--fault kill ...] [--strategy dp=2 ...] [--seed N] [--rounds N] [--write PAGE]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faulty import MOMENT
from benchmarks.harness import environment, record, table
from benchmarks.hosts import NoHosts, cut_link, hosts, started_on_hosts

STRATEGIES = ("dp=2", "fsdp=2", "tp=2", "pp=2")
HANG_SECONDS = 5.0
"""Seconds that the rows give as --hang-timeout: the default is a minute at least."""

LONGEST_SECONDS = 120.0
MARKERS = re.compile(r"(?<=^)(<!-- faults: start [^\n]*-->\n).*?(<!-- faults: end -->)", re.MULTILINE | re.DOTALL)
MARK = "SHARDWISE_FAULTS"
WORKLOAD = f"{Path(__file__).with_name('faulty.py')}:workload"


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault, and the outcome that a run must have with it.

    Attributes:
        status: the exit status.
        said: what the last line on standard error must match; RANK stands for the rank.
        signals: sent to the command, one after the other, once a few steps are done; none: the workload does it.
        goes_on: whether the run ends as if nothing had been.
    """

    status: int
    said: str
    signals: tuple[signal.Signals, ...] = ()
    goes_on: bool = False


FAULTS = {
    "raise": Fault(1, r"worker RANK failed"),
    "kill": Fault(1, r"worker RANK was killed by SIGKILL"),
    "leave": Fault(1, r"worker RANK ended with exit status 0, its work was not done"),
    "hang": Fault(1, r"worker RANK has been in __getitems__|worker RANK has been in _go_wrong"),
    "spin": Fault(1, r"worker RANK has been in _go_wrong"),
    "stop": Fault(1, r"worker RANK does not answer"),
    "slow": Fault(0, r"worker RANK is slow", goes_on=True),
    "terminate": Fault(143, r"told to end after step \d+: a checkpoint is in", (signal.SIGTERM,)),
    "interrupt": Fault(130, r"interrupted, all workers have ended", (signal.SIGINT,)),
    "interrupt twice": Fault(130, r"interrupted, all workers have ended", (signal.SIGINT, signal.SIGINT)),
    "kill command": Fault(-9, r"", (signal.SIGKILL,)),
}
CUT = "cut"
"""A link between two hosts is cut; both sides must end, and name the other's rank or host."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the matrix."""

    fault: str
    strategy: str
    rank: int | None
    step: int | None
    status: int
    seconds: float | None
    orphans: int
    resumed: str
    said: str
    holds: bool


def attempt(name: str, strategy: str, generator: random.Random) -> Outcome:
    """Run one row in a folder of its own."""
    fault = FAULTS[name]
    rank, step = generator.randrange(2), generator.randrange(4, 12)
    length = 120
    settings = {"fault": "" if fault.signals else name, "rank": rank, "step": step}
    with working_folder() as mark:
        process = start(strategy, settings, ("--steps", str(length), "--hang-timeout", str(HANG_SECONDS)))
        begin = send(process, fault.signals, step)
        errors = process.communicate(timeout=LONGEST_SECONDS)[1]
        ended = time.monotonic()
        begin = begin or (float(MOMENT.read_text()) if MOMENT.exists() else None)
        orphans = remaining(mark)
        line = told(errors, fault.said.replace("RANK", str(rank)))
        resumed = "-" if fault.goes_on else resume(strategy, length)
        holds = process.returncode == fault.status and bool(line or not fault.said) and not orphans
        return Outcome(
            fault=name,
            strategy=strategy,
            rank=None if fault.signals else rank,
            step=step,
            status=process.returncode,
            seconds=None if begin is None or fault.goes_on else round(ended - begin, 2),
            orphans=orphans,
            resumed=resumed,
            said=line or next(reversed(errors.strip().splitlines()), ""),
            holds=holds and resumed in ("-", "yes"),
        )


def start(strategy: str, settings: dict[str, Any], more: tuple[str, ...]) -> subprocess.Popen[str]:
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    line = [sys.executable, "-m", "shardwise", "train", WORKLOAD, "--strategy", strategy, "--out", "run", "--quiet"]
    return subprocess.Popen(
        [*line, "--checkpoint-every", "3", *pairs, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def send(process: subprocess.Popen[str], signals: tuple[signal.Signals, ...], step: int) -> float | None:
    """Send signals to the command after `step` steps; return the moment of the first, None where there are none."""
    if not signals:
        return None
    metrics = Path("run", "metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.01)
    begin = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    return begin


def told(errors: str, pattern: str) -> str:
    """Return the line that says what happened; empty where none does."""
    lines = [line.removeprefix("shardwise: ") for line in errors.splitlines() if line.startswith("shardwise: ")]
    return next((line for line in reversed(lines) if re.search(pattern, line)), "")


def resume(strategy: str, length: int) -> str:
    """Go on from what is left, without the fault; `yes` if all losses are those of a run that nothing happened to."""
    done = again(strategy, length, "run", "--resume", "auto")
    if done.returncode:
        return next(reversed(done.stderr.strip().splitlines()), "no")
    return "yes" if losses("run") == undisturbed(strategy, length) else "other losses"


@functools.cache
def undisturbed(strategy: str, length: int) -> dict[int, float]:
    """Return the losses of a run that nothing happens to."""
    again(strategy, length, "whole").check_returncode()
    return losses("whole")


def again(strategy: str, length: int, folder: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Train without a fault in `folder`."""
    line = [sys.executable, "-m", "shardwise", "train", WORKLOAD, "--strategy", strategy, "--out", folder, *more]
    settings = ["--set", "fault=", "--set", "pause=0", "--steps", str(length), "--quiet"]
    return subprocess.run([*line, *settings], capture_output=True, text=True, check=False)


def losses(folder: str) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def attempt_cut(generator: random.Random) -> Outcome:
    """Cut the link between two hosts; both must end and say whom they cannot reach."""
    step = generator.randrange(4, 12)
    with working_folder() as mark, hosts(1e9):
        arguments = ["train", WORKLOAD, "--strategy", "dp=2", "--steps", "100000", "--out", "run", "--quiet"]
        more = ["--hang-timeout", str(HANG_SECONDS)]
        streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        with started_on_hosts("shardwise", [*arguments, *more], 1, {}, **streams) as workers:
            metrics = Path("run", "metrics.jsonl")
            while not (metrics.exists() and metrics.read_text().count("\n") >= step):
                assert all(worker.poll() is None for worker in workers), "a worker ended before the link was cut"
                time.sleep(0.05)
            cut_link()
            begin = time.monotonic()
            errors = [worker.communicate(timeout=LONGEST_SECONDS)[1] for worker in workers]
            ended = time.monotonic()
            lines = [told(error, f"worker {1 - rank}") for rank, error in enumerate(errors)]
            statuses = [worker.returncode for worker in workers]
        orphans = remaining(mark)
        return Outcome(
            fault=CUT,
            strategy="dp=2 on 2 hosts",
            rank=None,
            step=step,
            status=max(statuses),
            seconds=round(ended - begin, 2),
            orphans=orphans,
            resumed="-",
            said=" | ".join(lines),
            holds=all(lines) and statuses == [1, 1] and not orphans,
        )


@contextlib.contextmanager
def working_folder() -> Iterator[str]:
    """Enter a new folder; yield what all processes started here carry in their environment."""
    before, folder = Path.cwd(), tempfile.mkdtemp(prefix="shardwise-faults-")
    os.environ[MARK] = folder
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        del os.environ[MARK]
        shutil.rmtree(folder)


def remaining(mark: str, patience: float = 2.0) -> int:
    """Count processes with `mark` in their environment that are still there `patience` seconds later."""
    end = time.monotonic() + patience
    while (count := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return count


def _marked(mark: str) -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            inside = f"{MARK}={mark}".encode() in (process / "environ").read_bytes()
            count += inside and state != "Z" and int(process.name) != os.getpid()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=[*FAULTS, CUT], help="one to try; several may be given")
    parser.add_argument("--strategy", action="append", help=f"default: {', '.join(STRATEGIES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the rank and the step of each fault")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of it is done")
    parser.add_argument("--name", default="faults", help="of the files in results/")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, between its markers")
    options = parser.parse_args()
    before, generator = environment(1), random.Random(options.seed)
    outcomes: list[Outcome] = []
    for name, strategy in plan(options):
        outcomes.append(attempt_cut(generator) if name == CUT else attempt(name, strategy, generator))
        print(asdict(outcomes[-1]), file=sys.stderr)
    rows = [{key: shown(value) for key, value in asdict(outcome).items()} for outcome in outcomes]
    settings = {"seed": options.seed, "hang_timeout_seconds": HANG_SECONDS}
    record(options.name, settings, rows, None, before)
    if options.write is not None:
        write_page(options.write, rows)
    return int(not all(outcome.holds for outcome in outcomes))


def write_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the rows into a page between its two markers, without what is the same in all of them."""
    left_out = ("orphans", "resumed")
    shorter = [
        {**{k: v for k, v in row.items() if k not in left_out}, "said": row["said"].partition("; all workers")[0]}
        for row in rows
    ]
    text, count = MARKERS.subn(lambda match: f"{match[1]}\n{table(shorter)}\n\n{match[2]}", page.read_text())
    if count != 1:
        raise SystemExit(f"{page} has {count} pairs of markers, must have one")
    page.write_text(text)


def plan(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the fault and the strategy of each row."""
    for _ in range(options.rounds):
        for name in options.fault or [*FAULTS, CUT]:
            for strategy in ["dp=2"] if name == CUT else options.strategy or STRATEGIES:
                yield name, strategy


def shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NoHosts as error:
        sys.exit(f"no hosts for the row {CUT}: {error}")
