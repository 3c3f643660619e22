"""Command line of Shardwise: each command parses its options, calls the API and prints the document.

Torch is not imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from traceback import format_exc
from types import FrameType
from typing import Any, NoReturn, TextIO

from shardwise import api
from shardwise.errors import (
    DataError,
    NotAccurate,
    NotFinite,
    NotVerified,
    PlanBroken,
    RequestError,
    ShardwiseError,
    WorkerFailed,
    WorkerHung,
    agreed,
    nearest,
    one_line,
)
from shardwise.launch.context import is_first, rank_context, under_launcher
from shardwise.launch.exit import end
from shardwise.launch.join import end_with_launcher
from shardwise.launch.output import document_stream, keep_apart
from shardwise.launch.ranks import RankContext
from shardwise.launch.signals import Terminated
from shardwise.reports.accuracy import accuracy_table
from shardwise.reports.accuracy_page import accuracy_files
from shardwise.reports.calibration import calibration_summary
from shardwise.reports.live import frame, news
from shardwise.reports.plan import check_summary, plan_summary
from shardwise.reports.prediction import prediction_table
from shardwise.reports.standing_page import standing_page
from shardwise.reports.terminal import Terminal, in_place_of
from shardwise.reports.text import comparison_table, training_summary, verification_table
from shardwise.starting import check_streams, leave_out_working_directory
from shardwise.units import parse_number, parse_whole
from shardwise.version import __version__

LESS_MEMORY = "less is needed with recompute=full, more microbatches, a smaller batch_size, or more workers and fsdp"
"""Remedies for a run that ran out of memory."""

REFRESH_SECONDS, LINES_SECONDS = 1.0, 10.0
"""Seconds between two looks of `watch` at a run: in a terminal, and if it prints lines to a file."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the convention of shells: 128 plus the number of SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 the work failed, 2 the request is wrong, 130 interrupted.

    A command that a signal ended returns 128 plus the number of the signal.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(given)
    try:
        if _names_engine(options) and not under_launcher():
            return _run_under(options, given)
        options.run(options)
    except ShardwiseError as error:
        _say_error(error)
        return error.exit_status
    except Terminated as error:
        return int(str(error.code))
    except SystemExit as error:
        code = "" if error.code is None else error.code
        sys.stderr.write(f"shardwise: the workload's code ended the program by sys.exit({code}): nothing was done\n")
        return 1
    except KeyboardInterrupt:
        if _context() is None:  # another launcher, or the command that runs it, says so for all workers
            sys.stderr.write("shardwise: interrupted, all workers have ended\n")
        return INTERRUPTED
    except Exception as error:
        context = _context()
        if context is None:
            raise
        _say_failure(context, error)
        return 1
    return 0


def command() -> NoReturn:
    """Run the program `shardwise` and end the process with the exit status of its command."""
    check_streams()
    leave_out_working_directory()
    context = _context()
    if context is not None:
        end_with_launcher(context)
        keep_apart()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once)
    end(main())


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt and ignore further Ctrl-C, which would interrupt the shutdown of workers.

    The shutdown takes milliseconds, so nobody needs a second Ctrl-C.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _names_engine(options: argparse.Namespace) -> bool:
    """Return whether a command names an engine other than local workers.

    Raises:
        RequestError: it names none, and has options for one.
    """
    if not hasattr(options, "engine"):
        return False
    if options.engine != "local":
        return True
    given = {"--hosts": options.hosts, "--image": options.image, "--dry-run": options.dry_run}
    words = [name for name, value in given.items() if value]
    if words:
        raise RequestError(f"{', '.join(words)}: only for another engine: give --engine too, --engine slurm say")
    return False


def _run_under(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command under the engine that it names, and return its exit status."""
    done = api.run_under(
        options.engine,
        arguments,
        strategy=getattr(options, "strategy", None),
        workers=options.workers,
        hosts=options.hosts,
        grace=getattr(options, "grace", 0.0),
        image=options.image,
        dry_run=options.dry_run,
    )
    if isinstance(done, int):
        return done
    _write(sys.stdout, done)
    return 0


def _train(options: argparse.Namespace) -> None:
    document = api.train(
        options.workload,
        strategy=options.strategy,
        workers=options.workers,
        steps=options.steps,
        epochs=options.epochs,
        out=options.out,
        resume="auto" if options.resume == "auto" else options.resume is not None,
        settings=agreed("--set", options.set),
        seed=options.seed,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        hang_timeout=options.hang_timeout,
        grace=options.grace,
        quiet=options.quiet,
        on_nan=options.on_nan,
        proof=options.proof,
        margin=options.margin,
        allow=options.allow,
        track=options.track,
    )
    _print(options, document, training_summary)


def _compare(options: argparse.Namespace) -> None:
    try:
        document = api.compare(
            options.workload,
            options.strategy,
            workers=options.workers,
            steps=options.steps,
            epochs=options.epochs,
            out=options.out,
            settings=agreed("--set", options.set),
            seed=options.seed,
            quiet=options.quiet,
            proof=options.proof,
            by_hand=options.by_hand,
        )
    except (KeyboardInterrupt, Terminated) as ended:
        measured = getattr(ended, "document", None)  # none if it was told before anything was trained
        if measured is not None:
            _print(options, measured, comparison_table)
        raise
    _print(options, document, comparison_table)


def _verify(options: argparse.Namespace) -> None:
    document = api.verify(
        options.workload,
        options.strategy,
        steps=options.steps,
        dtype=options.dtype,
        settings=agreed("--set", options.set),
        seed=options.seed,
        out=options.out,
        report=options.report,
    )
    _print(options, document, verification_table)
    failed = [row["strategy"] for row in document["results"] if not row["passed"]]
    if failed:
        raise NotVerified(f"{', '.join(failed)}: not the same training as on one worker")


def _export(options: argparse.Namespace) -> None:
    api.export(options.folder, options.file, form=options.form, best=options.best)
    _print(options, {"run": options.folder, "file": options.file}, lambda document: f"wrote {document['file']}")


def _simulate(options: argparse.Namespace) -> None:
    document = api.simulate(
        options.workload,
        options.strategy,
        cluster=options.cluster,
        trace=options.trace,
        slow=agreed("--slow", options.slow),
        dry_run=options.dry_run,
        runtime=options.runtime,
        settings=agreed("--set", options.set),
        seed=options.seed,
        margin=options.margin,
        bandwidth=options.bandwidth,
        report=options.report,
    )
    _print(options, document, prediction_table)


def _plan(options: argparse.Namespace) -> None:
    if options.check is not None:
        _check_alone(options)
        document = api.check_plan(
            options.check, cluster=options.cluster, workload=options.workload, margin=options.margin
        )
        _print(options, document, check_summary)
        if not document["holds"]:
            raise PlanBroken(f"{options.check} does not hold: {'; '.join(document['reasons'])}")
        return
    if options.workload is None:
        raise RequestError("plan: give a workload to plan for (image, gpt:layers=24, ...), or --check FILE")
    document = api.plan(
        options.workload,
        cluster=options.cluster,
        workers=options.workers,
        engine=options.plan_engine,
        objective=options.objective,
        max_memory=options.max_memory,
        fix=options.fix,
        forbid=options.forbid,
        allow=options.allow,
        out=options.out,
        dry_run=options.dry_run,
        pareto=options.pareto,
        runtime=options.runtime,
        settings=agreed("--set", options.set),
        seed=options.seed,
        margin=options.margin,
        report=options.report,
    )
    _print(options, document, plan_summary)


def _check_alone(options: argparse.Namespace) -> None:
    """Check that --check comes without the options that the plan file already settles.

    Raises:
        RequestError: some of them are given.
    """
    given = {
        "--set": options.set,
        "--seed": options.seed,
        "--workers": options.workers,
        "--engine": options.plan_engine != "local",
        "--objective": options.objective != "time",
        "--max-memory": options.max_memory,
        "--fix": options.fix,
        "--forbid": options.forbid,
        "--allow": options.allow,
        "--out": options.out,
        "--dry-run": options.dry_run,
        "--pareto": options.pareto,
        "--runtime": options.runtime != "shardwise",
        "--report": options.report,
    }
    words = [name for name, value in given.items() if value not in (None, False, [])]
    if words:
        raise RequestError(f"--check {options.check} is of that plan alone: leave out {', '.join(words)}")


def _calibrate(options: argparse.Namespace) -> None:
    document = api.calibrate(options.out, workers=options.workers, quiet=options.quiet, report=options.report)
    _print(options, document, calibration_summary)


def _validate(options: argparse.Namespace) -> None:
    document = api.validate(options.runs, standing=bool(options.standing), report=options.report)
    if options.write:
        _write_files("--write", Path(options.write), accuracy_files(document, Path(options.write).name))
    if options.standing:
        page = Path(options.standing)
        _write_files("--standing", page, {page.name: standing_page(document["standing"])})
    _print(options, document, accuracy_table)
    if options.fail_above is not None and document["mean_of_groups"] > options.fail_above:
        raise NotAccurate(
            f"the mean error over groups is {document['mean_of_groups']:.4f}, above {options.fail_above:g}"
        )


def _watch(options: argparse.Namespace) -> None:
    terminal = Terminal.of(sys.stdout)
    usual = REFRESH_SECONDS if terminal.live else LINES_SECONDS
    states = api.watch(options.folder, every=usual if options.every is None else options.every)
    if options.once:
        _print(options, next(states), lambda state: "\n".join(frame(state, terminal)))
        return
    shown: dict[str, Any] | None = None
    lines: list[str] = []
    try:
        for state in states:
            before = in_place_of(len(lines)) if terminal.live and not options.json else ""
            if options.json:
                lines = [json.dumps(state, allow_nan=False)]
            else:
                lines = frame(state, terminal) if terminal.live else news(shown, state)
            if not _write(sys.stdout, before + "".join(f"{line}\n" for line in lines)):
                return
            shown = state
    except KeyboardInterrupt:
        sys.stderr.write("shardwise: watched no longer; the run is not touched\n")


def _report(options: argparse.Namespace) -> None:
    path = api.report(options.folders, options.out)
    _print(options, {"report": str(path)}, lambda document: "")


def _write_files(option: str, page: Path, files: Mapping[str, str]) -> None:
    try:
        for name, text in files.items():
            (page.parent / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{option} {page}: cannot be written: {error}; give a file in a folder that is there"
        ) from error


def _print(options: argparse.Namespace, document: dict[str, Any], view: Callable[[dict[str, Any]], str]) -> None:
    """Print the result of a command, only on rank 0 of an outer launcher.

    With --json the document goes to standard output, and its view for people to standard error unless --quiet is given.
    Without --json only the view is printed, to standard output.
    """
    if not is_first():
        return
    if options.json:
        _write(document_stream(), json.dumps(document, allow_nan=False) + "\n")
    if not (options.json and options.quiet):
        _write(sys.stderr if options.json else document_stream(), "\n".join(filter(None, _view(document, view))) + "\n")


def _view(document: dict[str, Any], view: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Yield the view of a document for people, and where its report is."""
    yield view(document)
    if document.get("report"):
        yield f"report: {document['report']}"


def _write(stream: TextIO, text: str) -> bool:
    """Write and flush a text; a reader that has closed the pipe (`| head -1`) is no error.

    Returns False if the pipe is closed.

    Raises:
        ShardwiseError: it cannot be written for another reason, such as a full disk.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else the flush at exit would fail again
        if not isinstance(error, BrokenPipeError):
            raise ShardwiseError(
                f"the result cannot be written: {error.strerror}; the command itself was done"
            ) from error
        return False
    return True


def _say_error(error: ShardwiseError) -> None:
    """Write an error to standard error in one line, after the traceback of a worker that died.

    Errors that all workers of an outer launcher raise are written by one of them only.
    """
    if isinstance(error, WorkerHung):
        sys.stderr.write(f"{error.traceback}shardwise: {error}\n")
    elif isinstance(error, WorkerFailed) and error.traceback:
        how = "ran out of memory" if error.out_of_memory else "failed"
        less = f": {LESS_MEMORY}" if error.out_of_memory else ""
        told = f"shardwise: worker {error.rank} {how}, all workers have ended{less}"
        sys.stderr.write(f"{error.traceback.rstrip()}\n{told}\n")
    else:
        _say_once(error)


def _say_once(error: ShardwiseError) -> None:
    context = _context()
    if context is None:
        sys.stderr.write(f"shardwise: {error}\n")
        return
    from shardwise.launch.board import is_to_say, stay

    if is_to_say(context) is not False:
        sys.stderr.write(f"shardwise: {error}\n")
    if isinstance(error, RequestError | NotFinite):  # those that all workers raise
        stay(context)


def _say_failure(context: RankContext, error: Exception) -> None:
    """Write the traceback of an error of this worker, unless it only follows from that of another worker."""
    from shardwise.launch.board import is_to_say
    from shardwise.launch.host_watch import await_loss

    await_loss(error)
    first = is_to_say(context)
    if first is None and context.rank:  # rank 0 is gone, or was never there: it is the one to say more
        message = f"worker {context.rank} has lost the others: {type(error).__name__}: {error}"
        sys.stderr.write(f"shardwise: {one_line(message)}\n")
    elif first is not False:
        failed = WorkerFailed(f"{type(error).__name__}: {error}", rank=context.rank, traceback=format_exc())
        less = f" ran out of memory: {LESS_MEMORY}" if failed.out_of_memory else " failed"
        sys.stderr.write(f"{failed.traceback}shardwise: worker {context.rank}{less}\n")


def _context() -> RankContext | None:
    """Return this process's rank under another launcher. Returns None if it has none, or a wrong one."""
    try:
        return rank_context()
    except RequestError:
        return None


class _Parser(argparse.ArgumentParser):
    """Argument parser that answers a wrong word with one line that names the nearest known word."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Write one line on standard error and end with exit status 2."""
        _, missing, names = message.partition("arguments are required: ")
        if missing:
            message = self._missing(names.split(", "))
        self.exit(2, f"{self.prog}: {one_line(message)}; {self.prog} --help says more\n")

    def _missing(self, names: Sequence[str]) -> str:
        """Return the message for missing arguments; a single one comes with its help text."""
        if len(names) > 1:
            return f"{', '.join(names[:-1])} and {names[-1]} are missing"
        known = {"/".join(action.option_strings) or action.metavar: action.help for action in self._actions}
        return f"{names[0]} is missing: {known.get(names[0]) or 'give one'}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            what = "command" if isinstance(action, argparse._SubParsersAction) else action.dest
            self.error(f"unknown {what} {value!r}: known are {known}{nearest(str(value), map(str, action.choices))}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    options, unknown = parser.parse_known_args(_spelled_out(arguments))
    command = commands.get(options.command or "", parser)
    if unknown:
        word = unknown[0]
        kind = "option" if word.startswith("-") else "argument"
        command.error(f"unknown {kind} {word!r}{nearest(word.partition('=')[0], command._option_string_actions)}")
    if options.command is None:
        parser.error(f"no command: known are {', '.join(commands)}")
    return options


def _spelled_out(arguments: list[str]) -> list[str]:
    """Return the arguments with --resume spelled as --resume=run or --resume=auto.

    argparse would take the word after a bare --resume as its value, and that word may be the workload.
    """
    spelled: list[str] = []
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word == "--resume":
            spelled.append(f"--resume={'auto' if following == 'auto' else 'run'}")
        elif not (word == "auto" and spelled and spelled[-1] == "--resume=auto"):
            spelled.append(word)
    return spelled


def _add_proof(parser: _Parser) -> None:
    parser.add_argument(
        "--no-proof",
        dest="proof",
        action="store_false",
        help="train without comparing the first step with that of one process",
    )


def _add_margin(parser: _Parser) -> None:
    parser.add_argument(
        "--margin",
        type=_share,
        metavar="SHARE",
        help="of a device's memory that a strategy has to leave free (default: 0.05)",
    )


def _add_allow(parser: _Parser) -> None:
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="lossy|async",
        help="how the strategy that is chosen may change training (default: not at all)",
    )


def _add_report(parser: _Parser) -> None:
    parser.add_argument("--report", metavar="FILE", help="also write the result as a page of HTML")


def _add_engine(parser: _Parser) -> None:
    parser.add_argument(
        "--engine",
        default="local",
        metavar="NAME",
        help="what starts the workers: local (default), torchrun, mpi, slurm, ray, spark or kubernetes",
    )
    parser.add_argument("--hosts", metavar="A,B", help="hosts to run on, for engines that choose none themselves")
    parser.add_argument("--image", metavar="NAME", help="container image of the workers, for kubernetes")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the engine's script or manifest, and start nothing"
    )


def _add_runtime(parser: _Parser) -> None:
    parser.add_argument(
        "--runtime",
        default="shardwise",
        metavar="NAME",
        help="software that trains: shardwise (default), megatron, torchtitan, deepspeed or accelerate",
    )


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="shardwise", description="Trains one plain PyTorch model under any parallel strategy.")
    parser.add_argument("--version", action="version", version=f"shardwise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="train a workload", description="Trains a workload on local workers.")
    _add_workload(train)
    train.add_argument(
        "--strategy", metavar="SPEC", help="auto, single, dp=2, tp=2,pp=2, ..., or a plan file (default: auto)"
    )
    train.add_argument(
        "--resume",
        choices=("run", "auto"),
        metavar="auto",
        help="go on with the run in --out, under any strategy; auto: begin where there is none",
    )
    train.add_argument(
        "--checkpoint-every", type=_whole, default=0, metavar="N", help="steps between checkpoints (default: an epoch)"
    )
    train.add_argument("--keep", type=_whole, default=3, metavar="K", help="checkpoints that stay (default: 3)")
    train.add_argument(
        "--hang-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="end a run whose step takes longer (default: ten predicted steps, at least 60)",
    )
    train.add_argument(
        "--grace", type=_seconds, default=20.0, metavar="SECONDS", help="to write a checkpoint on SIGTERM (default: 20)"
    )
    train.add_argument(
        "--on-nan",
        default="stop",
        metavar="WHAT",
        help="at a loss or gradient that is not finite: stop, skip the step's update, or go on (default: stop)",
    )
    train.add_argument(
        "--track",
        metavar="NAMES",
        help="tensorboard, wandb, mlflow, several with commas, or none (default: tensorboard if it is installed)",
    )
    _add_proof(train)
    _add_margin(train)
    _add_engine(train)
    _add_allow(train)
    train.set_defaults(run=_train)
    compare = commands.add_parser(
        "compare", help="train under several strategies", description="Measures strategies in turns, slice by slice."
    )
    _add_workload(compare)
    _add_strategies(compare, "one to compare; give several (default: each axis)")
    _add_proof(compare)
    compare.add_argument(
        "--no-by-hand",
        dest="by_hand",
        action="store_false",
        help="leave out torch's own DDP and FSDP2, which train beside dp=K and fsdp=K",
    )
    compare.set_defaults(run=_compare)
    verify = commands.add_parser(
        "verify",
        help="show that strategies compute the same as one worker",
        description="Compares losses, gradients and updated parameters with those of one worker.",
    )
    _add_source(verify)
    _add_strategies(verify, "one to verify; give several", required=True)
    verify.add_argument("--steps", type=_whole, default=3, metavar="N", help="optimizer steps (default: 3)")
    verify.add_argument("--dtype", default="float32", metavar="DTYPE", help="float32, or float64 for a strict pass")
    verify.add_argument("--out", metavar="DIR", help="folder for verification.json (default: none)")
    _add_output(verify)
    _add_report(verify)
    verify.set_defaults(run=_verify)
    watch = commands.add_parser(
        "watch",
        help="show the progress of a run",
        description="Shows how far a run is, until it ends. It reads the run's folder, and changes nothing.",
    )
    watch.add_argument("folder", metavar="RUN", help="a run's folder")
    watch.add_argument("--once", action="store_true", help="show the state now, and end")
    watch.add_argument(
        "--every", type=_seconds, metavar="SECONDS", help="between two looks (default: 1, or 10 if lines go to a file)"
    )
    _add_output(watch)
    watch.set_defaults(run=_watch)
    export = commands.add_parser("export", help="write the plain weights of a run", description="Writes safetensors.")
    export.add_argument("folder", metavar="RUN", help="a run's folder")
    export.add_argument("file", metavar="OUT", help="the safetensors file or the folder to write")
    export.add_argument("--best", action="store_true", help="of the best evaluation, not the last step")
    export.add_argument(
        "--form",
        default="file",
        metavar="FORM",
        help="file (default); for a Hugging Face folder also folder (adapters merged) or adapter (adapters alone)",
    )
    _add_output(export)
    export.set_defaults(run=_export)
    simulate = commands.add_parser(
        "simulate",
        help="predict what strategies cost on a cluster",
        description="Predicts time and memory of a step; nothing is trained and no device is needed.",
    )
    _add_source(simulate)
    simulate.add_argument(
        "--cluster", required=True, metavar="NAME[xN]|FILE", help="h100x1024, dgx-a100, ... or a cluster file (.toml)"
    )
    _add_strategies(simulate, "one to predict; give several", required=True)
    simulate.add_argument("--trace", metavar="FILE", help="play the steps and write them for Perfetto (.json)")
    simulate.add_argument(
        "--slow", type=_slow, action="append", default=[], metavar="RANK=TIMES", help="a rank that computes as slowly"
    )
    simulate.add_argument(
        "--dry-run", action="store_true", help="also run the real program of one worker, without memory or hardware"
    )
    _add_runtime(simulate)
    _add_output(simulate)
    _add_margin(simulate)
    _add_report(simulate)
    simulate.add_argument(
        "--bandwidth", type=_times, default=1.0, metavar="TIMES", help="times the bandwidth of all links (default: 1)"
    )
    simulate.set_defaults(run=_simulate)
    plan = commands.add_parser(
        "plan",
        help="find the best strategy for a workload and a cluster",
        description="Predicts every strategy, chooses the best one and says why the others lost.",
    )
    _add_source(plan, optional=True)
    plan.add_argument(
        "--cluster", metavar="NAME[xN]|FILE", help="h100x1024, dgx-a100, ... or a cluster file (default: this machine)"
    )
    plan.add_argument(
        "--workers", metavar="N|A..B", help="devices to use; a range for the curve of scaling (default: all that pay)"
    )
    plan.add_argument(
        "--engine",
        dest="plan_engine",  # `engine` is that of commands which start workers
        default="local",
        metavar="NAME",
        help="slurm: plan for the tasks of the allocation that this command is in",
    )
    plan.add_argument(
        "--objective", default="time", metavar="WHAT", help="time, memory or money: what is to be small (default: time)"
    )
    plan.add_argument(
        "--max-memory", metavar="SIZE", help="of a device, for example 40GiB (default: what it has, less the margin)"
    )
    _add_margin(plan)
    _add_allow(plan)
    plan.add_argument("--fix", action="append", default=[], metavar="KEY=VALUE", help="an option it must have: tp=8")
    plan.add_argument(
        "--forbid", action="append", default=[], metavar="KEY[=VALUE]", help="one it must not have: pp, schedule=gpipe"
    )
    plan.add_argument("--out", metavar="FILE", help="plan file to write (.toml)")
    plan.add_argument(
        "--dry-run", action="store_true", help="also run the finalists' real program, without memory or hardware"
    )
    plan.add_argument("--pareto", action="store_true", help="also the fastest strategy for each smaller need of memory")
    plan.add_argument("--check", metavar="FILE", help="say whether a plan file still holds")
    _add_runtime(plan)
    _add_output(plan)
    _add_report(plan)
    plan.set_defaults(run=_plan)
    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine, for predictions",
        description="Measures kernels, collectives and what they do to each other, and writes a cluster file.",
    )
    calibrate.add_argument("--out", default="cluster.toml", metavar="FILE", help="default: cluster.toml")
    calibrate.add_argument(
        "--workers", type=_whole, metavar="N", help="local processes at most (default: 4 on a CPU, one for each GPU)"
    )
    _add_engine(calibrate)
    _add_output(calibrate)
    _add_report(calibrate)
    calibrate.set_defaults(run=_calibrate)
    validate = commands.add_parser(
        "validate",
        help="hold predictions against runs that others measured",
        description="Predicts each run of a CSV file and says by how much the predictions are off.",
    )
    validate.add_argument("runs", metavar="RUNS.csv", help="one run a row")
    validate.add_argument(
        "--fail-above", type=_share, metavar="ERROR", help="exit status 1 where the mean error over groups is larger"
    )
    validate.add_argument(
        "--write", metavar="PAGE.md", help="write the page of the validation, and its plots beside it"
    )
    validate.add_argument(
        "--standing", metavar="PAGE.md", help="also predict Shardwise on a few runs of each group, and write a page"
    )
    _add_output(validate)
    _add_report(validate)
    validate.set_defaults(run=_validate)
    report = commands.add_parser(
        "report",
        help="write a page about runs",
        description="Writes one page of HTML about runs or comparisons, from their files alone.",
    )
    report.add_argument("folders", nargs="+", metavar="RUN", help="folder of a run or of a comparison")
    report.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    _add_output(report)
    report.set_defaults(run=_report)
    return parser, {
        "train": train,
        "verify": verify,
        "compare": compare,
        "watch": watch,
        "export": export,
        "calibrate": calibrate,
        "simulate": simulate,
        "plan": plan,
        "validate": validate,
        "report": report,
    }


def _add_source(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "workload",
        nargs="?" if optional else None,
        metavar="WORKLOAD",
        help="image, language, medical, file.py:function, module:function, a folder with a Hugging Face config.json",
    )
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="a parameter of the workload"
    )
    parser.add_argument("--seed", type=_whole, metavar="N", help="of weights, data order and dropout")


def _add_strategies(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("--strategy", action="append", default=[], metavar="SPEC", help=text, required=required)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument(
        "--workers", type=_whole, metavar="N", help="local processes (default: what the strategy needs)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_whole, metavar="N", help="optimizer steps in all")
    passes = "passes over the data in all (default: the workload's)"
    length.add_argument("--epochs", type=_whole, metavar="N", help=passes)
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: a new one in runs/)")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _whole(text: str) -> int:
    try:
        return parse_whole(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _seconds(text: str) -> float:
    try:
        return parse_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


def _share(text: str) -> float:
    try:
        value = parse_number(text)
    except ValueError:
        value = -1.0
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: give 0.1 for 10%")
    return value


def _times(text: str) -> float:
    try:
        return parse_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: give 0.1 for a tenth") from None


def _slow(text: str) -> tuple[int, float]:
    rank, _, times = text.partition("=")
    try:
        return parse_whole(rank), parse_number(times)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write RANK=TIMES, for example 3=1.5") from None


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key, value
