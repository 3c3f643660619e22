"""torch's elastic agent for the workers of one host: `python -m shardwise.launch.engines.agent WORKERS GRACE COMMAND`.

torchrun's own rendezvous listen on all addresses of the host, and one of them unpickles what it is sent. This one
listens on the loopback device, at a port that the system chooses, and stores texts alone.
"""

from __future__ import annotations

import datetime
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardwise.launch.ranks import LOOPBACK

NAME = "shardwise-loopback"
"""Name of the rendezvous in torch's registry."""

SPARE_SECONDS = 5
"""Seconds beyond the grace of a run that workers get to end."""


class LoopbackRendezvous(RendezvousHandler):
    """Rendezvous of one agent, whose store is on the loopback device."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._parameters = parameters
        listener = socket.socket()
        listener.bind((LOOPBACK, 0))
        listener.listen(1024)
        self._port = int(listener.getsockname()[1])
        self._store = TCPStore(
            LOOPBACK,
            self._port,
            is_master=True,
            timeout=datetime.timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    @property
    def use_agent_store(self) -> bool:
        """Return True: workers meet at this store."""
        return True

    def get_backend(self) -> str:
        """Return the name of the rendezvous."""
        return NAME

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store for the next attempt."""
        place = RendezvousStoreInfo(LOOPBACK, self._port)
        return RendezvousInfo(PrefixStore(self._parameters.run_id, self._store), 0, 1, place)

    def is_closed(self) -> bool:
        """Return False: one agent has nobody to close it for."""
        return False

    def set_closed(self) -> None:
        """Do nothing: one agent has nobody to close it for."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other host can join."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the job."""
        return str(self._parameters.run_id)

    def shutdown(self) -> bool:
        """Return True: the store ends with this process."""
        return True


def main(arguments: Sequence[str]) -> int:
    """Run `COMMAND` in WORKERS processes; return the exit status of the worker that failed first, or 0."""
    workers, grace, *command = arguments
    rendezvous_handler_registry.register(NAME, LoopbackRendezvous)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its reports repeat what is said here
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(workers),
        run_id="shardwise",
        rdzv_backend=NAME,
        rdzv_endpoint=LOOPBACK,
        max_restarts=0,
        shutdown_timeout=round(float(grace)) + SPARE_SECONDS,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        sys.stderr.write(f"shardwise: worker {rank} was killed by {signal.Signals(-failure.exitcode).name}\n")
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
