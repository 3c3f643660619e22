"""A process beside a worker, on its host: it is started again when it dies, and ends when the worker does.

worker ── starts ──▶ beside.py    hears what to call on standard input, which stays open: its end is the worker's
└── listens on a socket, which the process inherits: connections that are made while it is dead wait for the next
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST_FAILURES, FAILURE_SECONDS = 5, 10.0
"""A process that fails so many times in a row, each within so many seconds of its start, is not started again."""

LINGER_SECONDS = 5.0
"""Largest number of seconds that the process may linger after this one has ended."""

STATE_FOLDER = "SHARDWISE_JOB_FOLDER"
"""Environment variable with the folder that the parent of local workers removes when the job has ended."""


class Beside:
    """Process that runs `function(*args, listener, ending)` for as long as this one lives.

    `ending` is a `threading.Event`, set when this one has ended or closed it. The process may then linger for others.

    Attributes:
        starts: number of times that it was started.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], listener: socket.socket, folder: str | None = None
    ) -> None:
        """Start the process. `folder` is removed when it has ended for good."""
        from shardwise.launch.sending import written

        self._begin(written((function, args)), listener, folder)

    @classmethod
    def of_work(cls, work: bytes, listener: socket.socket, folder: str | None) -> Beside:
        """Start a process whose function and arguments a worker has written, in a session of its own."""
        self = cls.__new__(cls)
        self._begin(work, listener, folder, session=True)
        return self

    def _begin(self, work: bytes, listener: socket.socket, folder: str | None, *, session: bool = False) -> None:
        self._listener, self._folder, self._session = listener, folder, session
        setup = {"path": sys.path, "listener": listener.fileno(), "folder": folder}
        head = json.dumps(setup).encode()
        self._input = b"".join(len(each).to_bytes(8, "little") + each for each in (head, work))
        self._closing = False
        self._lock = threading.Lock()
        self.starts = 0
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch, name="shardwise-beside", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port of the socket that the process listens on."""
        host, port, *_ = self._listener.getsockname()
        return str(host), int(port)

    def close(self) -> None:
        """Tell the process to end, and wait until it has ended: at most LINGER_SECONDS and a moment."""
        with self._lock:
            self._closing = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(LINGER_SECONDS + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "beside"],
            stdin=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            start_new_session=self._session,  # a terminal's Ctrl-C reaches the parent alone, which ends it in order
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: the watcher notices
            process.stdin.write(self._input)
            process.stdin.flush()
        return process

    def _watch(self) -> None:
        """Start the process again whenever it ends, until `close`."""
        failures = 0
        while True:
            begin = time.monotonic()
            self._process.wait()
            own = self._process.returncode != -signal.SIGKILL and time.monotonic() - begin < FAILURE_SECONDS
            failures = failures + 1 if own else 0
            with self._lock:
                if self._closing:
                    return
                if failures >= MOST_FAILURES:
                    self._listener.close()  # nobody waits for it any longer
                    return
                if self._process.stdin is not None:
                    with contextlib.suppress(OSError):
                        self._process.stdin.close()
                self._process = self._start()


def listen(host: str) -> socket.socket:
    """Return a socket that listens on a free port of one of this host's addresses. Raises OSError if it has it not."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family)
    try:
        listener.bind((host, 0))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _main() -> None:
    """Hear what to call, call it, and end with the process that started this one."""
    os.dup2(2, 1)
    setup, work = json.loads(_heard()), _heard()
    ending = threading.Event()
    threading.Thread(target=_end_with_starter, args=(ending, setup["folder"]), name="starter", daemon=True).start()
    sys.path[:] = setup["path"]
    import cloudpickle

    function, args = cloudpickle.loads(work)
    function(*args, socket.socket(fileno=setup["listener"]), ending)


def _heard() -> bytes:
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    return sys.stdin.buffer.read(size)


def _end_with_starter(ending: threading.Event, folder: str | None) -> None:
    """Wait for the end of standard input, let the function linger, remove the folder, and end this process."""
    while sys.stdin.buffer.read(1):
        pass
    ending.set()
    time.sleep(LINGER_SECONDS)
    leave(folder)


def leave(folder: str | None) -> NoReturn:
    """Remove a folder, and end this process at once."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules must not be importable by their bare names
    _main()
