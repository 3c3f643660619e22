"""Worker processes that stay for the whole test session: starting them anew for every test would take seconds.

    test process ── fork server A ── workers 0, 2, ...      each forked with what it needs imported: that takes
              └──── fork server B ── workers 1, 3, ...      more processor time than most tests

Two servers, because workers forked from one would hash strings alike: what depends on the order of a set must still
differ from one worker to the next, as it does between workers that are started for themselves.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle

TIMEOUT_SECONDS = 300.0
GRACE_SECONDS = 10.0
"""Seconds that the other workers of a failed call have to end it: their connections to the failed one break."""

PRELOAD = (
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.export._trace",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "shardwise.parallel.graph.graph_engine",
    "shardwise.parallel.data.module_engine",
    "shardwise.run.checkpoint.checkpoints",
    "shardwise.launch.shared_memory.registration",
)
"""Modules that every worker comes to need. Importing these starts no thread, so the server may fork."""


class RemoteTraceback(Exception):
    """The traceback of a worker, as text: the cause of the exception that the test sees."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class Pools:
    """Pools by their number of workers, each started when it is first asked for.

        results = workers(4, function, *args)       # function(*args) on each worker -> results by rank

    The function runs with a fresh default process group and one thread; functions and arguments travel by
    cloudpickle. The first exception of a worker is raised here. One worker is this process, without a process group.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._pools: dict[int, Pool] = {}

    def apart(self) -> Pools:
        """Pools that share nothing with these but the processes that workers are forked from."""
        return Pools(self._servers)

    def __call__(
        self, count: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS
    ) -> list[Any]:
        if count == 1:
            return [function(*args)]
        pool = self._pools.get(count)
        if pool is None or pool.broken:
            if pool is not None:
                pool.close()
            pool = self._pools[count] = Pool(count, self._servers)
        return pool.call(function, args, timeout)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class Servers:
    """The processes that workers are forked from, started with the first worker; they end with this process.

    `preload` are further modules that all workers are to have imported.
    """

    def __init__(self, preload: Iterable[str] = ()) -> None:
        self._servers = [ForkServer(), ForkServer()]
        for server in self._servers:
            server.set_forkserver_preload([*PRELOAD, *preload])

    def start(self, process: Any, rank: int) -> None:
        """Starts a process of the context `forkserver` from the server of a rank."""
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            for server in self._servers:
                server.ensure_running()  # both import at the same time
        chosen = self._servers[rank % len(self._servers)]
        with mock.patch("multiprocessing.forkserver.connect_to_new_process", chosen.connect_to_new_process):
            process.start()


class Pool:
    """A fixed number of processes that each run what they are sent."""

    def __init__(self, count: int, servers: Servers) -> None:
        self.broken = False
        self._calls = 0
        self._folder = tempfile.TemporaryDirectory(prefix="shardwise-pool-")
        context = multiprocessing.get_context("forkserver")
        self._workers: list[tuple[Any, Connection]] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, theirs), daemon=True)
            servers.start(process, rank)
            theirs.close()
            self._workers.append((process, ours))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        self._calls += 1
        store = str(Path(self._folder.name, f"store-{self._calls}"))
        message = cloudpickle.dumps((function, args))
        for _, pipe in self._workers:
            pipe.send((sys.path, store, message))
        results: dict[int, Any] = {}
        errors: list[BaseException] = []
        deadline = time.monotonic() + timeout
        while len(results) < len(self._workers):
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                missing = sorted(waiting.values())
                raise cause(errors) or TimeoutError(f"workers {missing} did not answer within {timeout:.0f} s")
            for answered in ready:
                assert isinstance(answered, Connection)
                rank = waiting[answered]
                results[rank], failure = self._receive(rank)
                if failure is not None:
                    deadline = deadline if errors else min(deadline, time.monotonic() + GRACE_SECONDS)
                    errors.append(failure)
        error = cause(errors)
        if error is not None:
            raise error
        return [results[rank] for rank in range(len(self._workers))]

    def _receive(self, rank: int) -> tuple[Any, BaseException | None]:
        process, pipe = self._workers[rank]
        try:
            ok, payload = pipe.recv()
        except EOFError:
            process.join(5)
            self.broken = True
            return None, RuntimeError(f"worker {rank} died with exit code {process.exitcode}")
        if ok:
            return cloudpickle.loads(payload), None
        exception, text = cloudpickle.loads(payload)
        exception.__cause__ = RemoteTraceback(f"worker {rank}: {text}")
        return None, exception

    def close(self) -> None:
        self.broken = True
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._folder.cleanup()


def serve(rank: int, count: int, pipe: Connection) -> None:
    """Run what the worker is sent until its pipe closes."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import numpy as np
    import torch

    random.seed()  # forked workers would draw alike
    np.random.seed()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            path, store, message = pipe.recv()
            sys.path[:] = path
            pipe.send(answer(rank, count, store, message))


def answer(rank: int, count: int, store: str, message: bytes) -> tuple[bool, bytes]:
    """(True, pickled result) or (False, pickled exception and traceback)."""
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from shardwise.launch.shared_memory.backend import backend
    from shardwise.parallel.mesh import forget_meshes

    try:
        dist.distributed_c10d._world.group_count = 0  # where the last group was not made, torch goes on counting
        dist.init_process_group(backend(), store=FileStore(store, count), rank=rank, world_size=count)
        try:
            dist.barrier()  # a worker that fails at once must not be gone before the others have connected
            function, args = cloudpickle.loads(message)
            return True, cloudpickle.dumps(function(*args))
        finally:
            dist.destroy_process_group()
            forget_meshes()
            while gc.collect():  # programs hold themselves in circles, and their groups several threads each
                pass
            gc.freeze()  # what is left stays: imported modules, kept traces
    except BaseException as error:
        text = traceback.format_exc()
        try:
            payload = cloudpickle.dumps((error, text))
            cloudpickle.loads(payload)
        except Exception:
            payload = cloudpickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
        return False, payload


def use_backend(name: str) -> None:
    """Replace this worker's process group by one of another backend. Collective."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    rank, count = dist.get_rank(), dist.get_world_size()
    store = PrefixStore(name, dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group(name, store=store, rank=rank, world_size=count)


def cause(errors: list[BaseException]) -> BaseException | None:
    """The first error that is not what another worker's end did to a connection, which may arrive before it."""
    return next((error for error in errors if "Connection" not in str(error)), errors[0] if errors else None)


def end_with_parent() -> None:
    """Ends this process when the one that runs the tests ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
