"""Loop of an elastic training: it begins again from the last commit when a collective fails or the workers change."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from shardwise.compat.horovod.elastic.state import TorchState
from shardwise.compat.horovod.operations import barrier
from shardwise.compat.horovod.requests import HorovodInternalError, HostsUpdatedInterrupt
from shardwise.compat.horovod.world import global_process_set, init, negotiator_of, shutdown


def run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the function that trains, whose first argument is a `TorchState`.

        @hvd.elastic.run
        def train(state): ...

    Under `torchrun --max-restarts N` the workers that replace failed ones go on from the last commit. A collective that
    fails while all ranks live restores the last commit in this process; HostsUpdatedInterrupt keeps the present state.
    """

    @wraps(function)
    def elastic(state: TorchState, *args: Any, **kwargs: Any) -> Any:
        init()
        state.recover()
        while True:
            state.sync()
            try:
                result = function(state, *args, **kwargs)
                barrier()  # a rank that fails now lets all begin again
                state.finish()
                return result
            except HorovodInternalError:
                if negotiator_of(global_process_set).broken:  # a rank is gone: torchrun starts new workers
                    raise
                state.restore()
            except HostsUpdatedInterrupt:
                pass
            shutdown()
            init()
            state.on_reset()

    return elastic
