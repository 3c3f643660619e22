"""Python processes that have imported torch before they start: importing it takes longer than what most tests run.

    test process ── server ──┬── python -m shardwise train ...   forked, with the arguments, streams, folder and
                             ├── its worker 0                    environment that it is started with
                             └── its worker 1                    (those that torchrun starts, too)

A forked process runs the same program as a fresh one, as `__main__`, and ends, or is ended, in the same ways. What it
does not show is how an interpreter starts: tests of import paths, of allocator settings and of what is imported start
their own. All processes of one server hash strings alike, each server differently.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

IMPORTED = (
    "pytest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.export._trace",
    "shardwise.cli",
    "shardwise.parallel.data.module_engine",
    "shardwise.parallel.graph.graph_engine",
    "shardwise.planner.plan",
    "shardwise.run.training.execute",
    "sklearn.datasets",
)
"""Modules that the server imports. Importing them starts no thread, so it may fork."""

LENGTH = struct.Struct("=I")
"""Number of bytes of the order that follows, as JSON."""

MOST_PASSED = 1
"""Largest number of descriptors that a process gets beside its streams, under the numbers that they have here."""

ENVIRONMENT = "environment"
"""Name of the file without a folder (memfd_create(2)) in which a process of the server holds its environment."""

NUMBER = struct.Struct("=i")
"""Answer of the server: the process's number, and later its exit status, -N after signal N."""


class Started:
    """A process of the server, as far as tests use the interface of `subprocess.Popen`."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        pass_fds: Sequence[int] = (),
        address: str | None = None,
    ) -> None:
        """Start `python -m MODULE ...` or `python SCRIPT ...`, by the server at `address` or else by our own."""
        assert len(pass_fds) <= MOST_PASSED
        self.arguments, self.returncode = list(args), None
        order = {
            "arguments": self.arguments[1:],
            "folder": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
            "passed": list(pass_fds),
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address or server_address())
        with contextlib.ExitStack() as theirs:
            self.stdin, given = _input(stdin, theirs)
            self.stdout, output = _stream(stdout, 1, theirs)
            self.stderr, errors = (None, output) if stderr == subprocess.STDOUT else _stream(stderr, 2, theirs)
            text = json.dumps(order).encode()
            socket.send_fds(self._connection, [LENGTH.pack(len(text))], [given, output, errors, *pass_fds])
            self._connection.sendall(text)
            self.pid = self._number()

    returncode: int | None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
            self.returncode = self._number(socket.MSG_PEEK)  # another thread may wait for it, too
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        read = {1: "", 2: ""}

        def exhaust(number: int, file: IO[str]) -> None:
            with file:
                read[number] = file.read()

        streams = {number: file for number, file in ((1, self.stdout), (2, self.stderr)) if file and not file.closed}
        readers = [threading.Thread(target=exhaust, args=stream, daemon=True) for stream in streams.items()]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
        self.wait(timeout)
        return read[1], read[2]

    def _number(self, flags: int = 0) -> int:
        (number,) = NUMBER.unpack(self._connection.recv(NUMBER.size, socket.MSG_WAITALL | flags))
        return int(number)


def run(arguments: Sequence[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a process of the server to its end; return its exit status and what it wrote."""
    process = Started(arguments, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.arguments, process.wait(), output, errors)


def environment(process: Path) -> bytes:
    """Return the environment of a process of a server by its folder in /proc; nothing, if it is of no server."""
    held = (process / "fd" / "3", process / "fd" / "4")
    found = [file for file in held if file.is_symlink() and f"memfd:{ENVIRONMENT}" in str(file.readlink())]
    return b"".join(file.read_bytes() for file in found)


def _input(chosen: int, theirs: contextlib.ExitStack) -> tuple[IO[bytes] | None, int]:
    """Return our end of standard input, if it is a pipe, and the descriptor that the process gets."""
    if chosen != subprocess.PIPE:
        return None, theirs.enter_context(Path(os.devnull).open()).fileno()
    reading, writing = os.pipe()
    theirs.callback(os.close, reading)
    return os.fdopen(writing, "wb"), reading


def _stream(chosen: int | None, own: int, theirs: contextlib.ExitStack) -> tuple[IO[str] | None, int]:
    """Return our end of a stream, if it is a pipe, and the descriptor that the process gets."""
    if chosen != subprocess.PIPE:
        return None, own if chosen is None else chosen
    reading, writing = os.pipe()
    theirs.callback(os.close, writing)
    return os.fdopen(reading), writing


class _Server:
    """The server of this test process, which ends with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shardwise-warm-")
        self.address = str(Path(self._folder.name, "socket"))
        ours = {name: value for name, value in os.environ.items() if name != "SHARDWISE_TEST_MARK"}  # it is no run
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py")), self.address, *IMPORTED],
            stdin=subprocess.PIPE,  # closed when this process ends, however that happens
            stdout=subprocess.PIPE,
            env={**ours, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"


@functools.cache
def _server() -> _Server:
    return _Server()


def server_address() -> str:
    """Return the address of this process's server, which is started if there is none."""
    return _server().address


def start_here(address: str, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let this process start workers, and processes beside them such as parameter servers, by the server at `address`.

    `replace(module, name, value)` puts the server in the place of `subprocess`.
    """
    from shardwise.launch import beside, processes

    own = SimpleNamespace(
        Popen=functools.partial(Started, address=address),
        TimeoutExpired=subprocess.TimeoutExpired,
        DEVNULL=subprocess.DEVNULL,
        PIPE=subprocess.PIPE,
    )
    for module in (processes, beside):
        replace(module, "subprocess", own)
