"""Costs of parameter servers: messages of gradients and parameters, the servers' work, and their memory.

    worker     sends gradients to all servers, waits, receives parameters from all
    server     receives gradients of all workers, logs and adds them up, updates, sends parameters to all

Servers work side by side. The messages of a step take as long as on the busiest end: a worker's, which has those of all
servers, or a server's, which has those of all workers.

In memory, per element of a server: parameter, optimizer states, mean gradient, and while they are not joined one
gradient of each worker. In time, per element and worker: a gradient written to the log and added to the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.collective import Collective
from shardwise.errors import StrategyError
from shardwise.predict.closed_form.offload import has_host, updated
from shardwise.predict.closed_form.stage_time import CommunicationTimes
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.holdings import Worker
from shardwise.strategy import Strategy
from shardwise.units import format_bytes

LOGGED_BYTES, ADDED_BYTES = 8, 12
"""Bytes of memory that a server reads and writes per element of a gradient, to log it and to add it to a mean."""


def message_seconds(calls: CommunicationTimes, messages: Sequence[Collective], workers: int) -> float:
    """Return the seconds of the messages between all workers and all servers, given those of one worker one way."""
    seconds = [calls.of(each) for each in messages]
    return max(sum(seconds), workers * max(seconds, default=0.0))


def server_seconds(calls: CommunicationTimes, profile: Profile, strategy: Strategy, worker: Worker) -> float:
    """Return the seconds in which the busiest server logs and adds the gradients of all workers, and updates."""
    update = profile.update.of(strategy)
    found = 0.0
    for elements, tensors, _ in worker.served:
        moved = elements * strategy.workers * (LOGGED_BYTES + ADDED_BYTES)
        if calls.times.device.kind == "gpu":
            seconds = updated(moved + elements * sum(kernel.bytes for kernel in update.kernels), calls.times.device)
        else:
            seconds = calls.moved(elements, moved, tensors).total
            seconds += sum(calls.moved(elements, kernel.bytes * elements, tensors).total for kernel in update.kernels)
        found = max(found, seconds)
    return found


def server_bytes(profile: Profile, strategy: Strategy, worker: Worker) -> int:
    """Return the bytes of the tensors of the server that needs most, all contributions of a step included."""
    state = profile.update.of(strategy).state_bytes
    return max(
        (round(size * (2 + strategy.workers) + elements * state) for elements, _, size in worker.served), default=0
    )


def server_notes(profile: Profile, strategy: Strategy, worker: Worker) -> tuple[str, ...]:
    """Return a line on the messages and the memory of parameter servers; none without servers."""
    if not strategy.ps:
        return ()
    sent = sum(size for _, _, size in worker.served)
    needed = server_bytes(profile, strategy, worker)
    return (
        f"each worker sends {format_bytes(sent)} of gradients in a step and receives as much; each of {strategy.ps} "
        f"parameter server{'s' * (strategy.ps > 1)} needs {format_bytes(needed)} of its host's memory as well",
    )


def check_servers(strategy: Strategy, worker: Worker, calls: CommunicationTimes) -> None:
    """Raise StrategyError if there are more servers than parameters, or nothing is known of the hosts they run on."""
    if not strategy.ps:
        return
    count = sum(tensors for _, tensors, _ in worker.served)
    if strategy.ps > count:
        raise StrategyError(f"ps={strategy.ps}: the model has {count} trained parameters: use ps={count} or fewer")
    device = calls.times.device
    if device.kind == "gpu" and not has_host(device):
        raise StrategyError(
            f"ps={strategy.ps}: nothing is known of the hosts of {device.name}, which update the parameters: write "
            "host_memory_bandwidth into a cluster file"
        )
