"""The program of one worker process, started as `python .../worker.py SOCKET`; the parent's end is `switchboard`.

Everything heavy is imported after the parent said where to import from and with how many threads to compute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from typing import Any


def main(address: str) -> None:
    """Connect to the parent, call the function that it sends, answer, and end this process."""
    os.dup2(2, 1)  # standard output is the parent's alone: what workers print must not mix with its JSON
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.enable()
    line = socket.socket(socket.AF_UNIX)
    line.connect(address)
    parent = Connection(line.detach())
    _send(parent, {"rank": int(os.environ["RANK"])})
    setup, work = json.loads(parent.recv_bytes()), parent.recv_bytes()
    threading.Thread(target=_end_with, args=(parent,), name="shardwise-parent", daemon=True).start()
    try:
        returned = _work(setup, work, parent)
    except BaseException as error:
        _report(parent, error)
        time.sleep(setup["linger"])
        os._exit(1)  # a plain exit would wait for threads that wait for other workers
    _send(parent, {"time": time.monotonic(), "returned": len(returned)})
    parent.send_bytes(returned)
    from shardwise.ending import end

    end(0)


def _work(setup: dict[str, Any], work: bytes, parent: Connection) -> bytes:
    """Call the function among all workers; return its result as cloudpickle writes it, empty unless rank 0."""
    sys.path[:] = setup["path"]
    os.environ.setdefault("OMP_NUM_THREADS", str(setup["threads"]))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not setup["gpus"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from shardwise.launch import watch
    from shardwise.launch.join import die_with_parent, join_local, leave

    die_with_parent()
    rank = int(os.environ["RANK"])
    watch.settle(rank, setup["workers"], watch.FolderBoard(setup["folder"]), partial(_report, parent))
    import cloudpickle

    join_local(os.path.join(setup["folder"], "store"), rank, setup["workers"])
    function, arguments = cloudpickle.loads(work)
    value = function(*arguments)
    leave()
    returned: bytes = cloudpickle.dumps(value) if rank == 0 else b""
    return returned


def _report(parent: Connection, error: BaseException) -> None:
    """Tell the parent what went wrong, leaving out this file's own frames."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    report = {"time": time.monotonic(), "error": type(error).__name__, "message": str(error), "traceback": text}
    report |= {name: value for name, value in vars(error).items() if name in ("rank", "traceback")}  # WorkerFailed
    with contextlib.suppress(OSError):
        _send(parent, report)


def _send(parent: Connection, header: dict[str, Any]) -> None:
    parent.send_bytes(json.dumps(header).encode())


def _end_with(parent: Connection) -> None:
    """Ends this process, and what it started, as soon as the parent hangs up; the parent sends nothing more."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the launcher starts each worker as a group of its own


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules are not for importing by their bare names
    main(sys.argv[1])
