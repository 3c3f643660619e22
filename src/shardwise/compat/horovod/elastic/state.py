"""State of an elastic training: what is committed survives failures, and is the same on all ranks after `sync`.

Under torchrun a failure ends all workers, and the agent of each host starts new ones. So a commit is also written to a
file of the host, by its first worker, in the folder of the agent that stays:

    <temporary folder>/shardwise-elastic-USER-AGENT-START/state     number of the commit and values, without pickle

The newest of these files is the state of all ranks that start later. It ends with the agent, so use checkpoints, too.
"""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import torch

from shardwise.compat.horovod.elastic.sampler import ElasticSampler
from shardwise.compat.horovod.functions import allgather_object, broadcast_object
from shardwise.compat.horovod.objects import decode, encode
from shardwise.compat.horovod.world import local_rank
from shardwise.errors import RequestError
from shardwise.launch.context import rank_context


class _Stateful(Protocol):
    """Object with a state: a module, an optimizer, a scheduler or a sampler."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


_STATEFUL = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, ElasticSampler)


class TorchState:
    """Model, optimizer and further values of an elastic training, each an attribute.

        state = TorchState(model, optimizer, epoch=0, batch=0)

    Modules, optimizers, schedulers and samplers are saved by their `state_dict`; other values must be plain, see
    `broadcast_object`.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **values: Any) -> None:
        given = {"model": model, "optimizer": optimizer, **values}
        self._names = [name for name, value in given.items() if value is not None or name in values]
        self._callbacks: list[Callable[[], None]] = []
        self._commits = 0
        self.__dict__.update(given)
        self.save()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the state has no {name!r}: give it to TorchState({name}=...)")

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Call functions after each change of the workers, for example to adapt the learning rate to their number."""
        self._callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Call the registered functions, and share the samples among the present ranks."""
        for name in self._names:
            if isinstance(value := getattr(self, name), ElasticSampler):
                value.reset()
        for callback in self._callbacks:
            callback()

    def save(self) -> None:
        """Keep the present values in memory, for `restore`."""
        self._saved = copy.deepcopy(self._values())

    def restore(self) -> None:
        """Return to the values of the last `save` or `commit`."""
        self._load(copy.deepcopy(self._saved))

    def commit(self) -> None:
        """Keep the present values, also for workers that are started after a failure.

        Raises:
            RequestError: a value is not plain, or the file cannot be written.
        """
        self.save()
        self._commits += 1
        if (path := _file()) is not None and local_rank() == 0:
            _write(path, encode([self._commits, self._saved]))
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Do nothing: when hosts come or go, torchrun ends the workers, and new ones go on from the last commit."""

    def recover(self) -> None:
        """Take over the last commit of workers that failed, if this process was started in place of one."""
        if (path := _file()) is not None and path.exists():
            commits, values = decode(path.read_bytes())
            self._commits = int(commits)
            self._load(values)

    def finish(self) -> None:
        """Remove the file of commits: the training has ended on all ranks."""
        if (path := _file()) is not None and local_rank() == 0:
            path.unlink(missing_ok=True)
            path.parent.rmdir()

    def sync(self) -> None:
        """Take over the values of the rank with the newest commit; collective."""
        commits = allgather_object(self._commits, "elastic.commits")
        root = commits.index(max(commits))
        values = broadcast_object(self._values(), root, "elastic.state")
        self._commits = commits[root]
        self._load(values)
        self.save()

    def _values(self) -> dict[str, Any]:
        return {name: _value(getattr(self, name)) for name in self._names}

    def _load(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            present = getattr(self, name)
            if isinstance(present, _STATEFUL):
                present.load_state_dict(value)
            else:
                setattr(self, name, value)


def _value(value: Any) -> Any:
    return value.state_dict() if isinstance(value, _STATEFUL) else value


def _file() -> Path | None:
    """Return the file of this host's commits. Returns None if nobody would start this worker again.

    Raises:
        RequestError: the folder belongs to somebody else, or others may enter it.
    """
    context = rank_context()
    if context is None or not context.elastic:
        return None
    name = f"shardwise-elastic-{os.getuid()}-{os.getppid()}-{start_of(os.getppid())}"
    folder = Path(gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RequestError(f"{folder} is not a folder that only you can enter: remove it")
    return folder / "state"


def start_of(process: int) -> str:
    """Return when a process was started, in ticks since the boot; empty where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _write(path: Path, data: bytes) -> None:
    """Replace a file at once, so that a failure leaves the old one or the new one. Raises RequestError."""
    part = path.with_suffix(".part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise RequestError(f"the elastic state cannot be written to {path}: {error}") from error
