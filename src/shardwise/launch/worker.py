"""Program of one local worker process, `python .../worker.py SOCKET RANK`; `switchboard` is the parent's side.

Heavy modules are imported only after the parent has sent the import path and the number of threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
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
from multiprocessing.reduction import send_handle
from typing import Any

_sending = threading.Lock()


def main(address: str, rank: int) -> None:
    """Connect to the parent, call the function that it sends, send back the result, and end this process."""
    os.environ["SHARDWISE_OUTPUT"] = str(os.dup(1))  # see `context.write_to_output`
    os.dup2(2, 1)  # only the parent writes to standard output: prints of workers must not mix with its JSON
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.enable()
    line = socket.socket(socket.AF_UNIX)
    line.connect(address)
    parent = Connection(line.detach())
    _send(parent, {"rank": rank})
    setup, work = json.loads(parent.recv_bytes()), parent.recv_bytes()
    threading.Thread(target=_hear, args=(parent,), name="shardwise-parent", daemon=True).start()
    try:
        returned = _work(rank, setup, work, parent)
    except BaseException as error:
        _report(parent, error)
        time.sleep(setup["linger"])
        os._exit(1)  # sys.exit would wait for threads, which may wait for other workers
    _send(parent, {"time": time.monotonic(), "returned": len(returned)})
    parent.send_bytes(returned)
    from shardwise.launch.exit import end

    end(0)


def _work(rank: int, setup: dict[str, Any], work: bytes, parent: Connection) -> bytes:
    """Join the other workers and call the function; return its pickled result on rank 0, else empty bytes."""
    sys.path[:] = setup["path"]
    os.environ.setdefault("OMP_NUM_THREADS", str(setup["threads"]))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not setup["gpus"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()  # imports make many objects and no garbage
    from shardwise.launch import gate, regroup, watch
    from shardwise.launch.beside import STATE_FOLDER
    from shardwise.launch.exit import die_with_parent
    from shardwise.launch.join import join_local, leave
    from shardwise.launch.output import write_whole_lines

    generation = setup["generation"]
    die_with_parent()
    write_whole_lines()
    os.environ[STATE_FOLDER] = setup["folder"]
    watch.settle(rank, setup["workers"], watch.FolderBoard(setup["folder"]), partial(_report, parent))
    gate.settle(lambda value: _send(parent, {"waiting": value}))
    place = (setup["folder"], rank, setup["workers"], generation)
    regroup.settle(partial(_send, parent), partial(_hand_over, parent), *place, wanted=setup["restarts"])
    import cloudpickle

    if not setup["restarts"]:
        join_local(os.path.join(setup["folder"], "store"), rank, setup["workers"])
    elif not generation:
        regroup.join()
    function, arguments = cloudpickle.loads(work)  # one that is started again joins once it has loaded what it needs
    gc.enable()
    value = function(*arguments)
    leave()
    returned: bytes = cloudpickle.dumps(value) if rank == 0 else b""
    return returned


def _report(parent: Connection, error: BaseException) -> None:
    """Send an error and its traceback to the parent, without the outer frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    report = {"time": time.monotonic(), "error": type(error).__name__, "message": str(error), "traceback": text}
    report |= {name: value for name, value in vars(error).items() if name in ("rank", "traceback")}  # WorkerFailed
    with contextlib.suppress(OSError):
        _send(parent, report)


def _send(parent: Connection, header: dict[str, Any]) -> None:
    with _sending:
        parent.send_bytes(json.dumps(header).encode())


def _hand_over(parent: Connection, work: bytes, listener: socket.socket, folder: str) -> None:
    """Let the parent run a process that listens on `listener`, which is closed here, see `launch.beside`."""
    with _sending:
        parent.send_bytes(json.dumps({"beside": folder}).encode())
        parent.send_bytes(work)
        send_handle(parent, listener.fileno(), None)
    listener.close()


def _hear(parent: Connection) -> None:
    """Open the gate at each empty frame of the parent, and pass on the others.

    Kills this process and all that it started once the parent hangs up.
    """
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = parent.recv_bytes()
            from shardwise.launch import gate, regroup  # a parent sends no frame before this worker has sent one

            if message:
                regroup.hear(json.loads(message))
            else:
                gate.open_gate()
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the parent starts each worker in a process group of its own


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules must not be importable by their bare names
    main(sys.argv[1], int(sys.argv[2]))
