"""Rules of parameter servers that the program and the prediction share: owners of parameters, and bytes of messages.

A step of worker W with K servers:

    push    gradients of all parameters      to each server those of its parameters
    pull    updated parameters               from each server its own
"""

from __future__ import annotations

from collections.abc import Mapping

from shardwise.splitting.ownership import assign_owners

WORTH_ROWS = 0.5
"""Largest share of a matrix's rows that are not zero for which they are sent one by one, each with its number."""

ROW_NUMBER_BYTES = 8
"""Bytes of the number of a row."""


def server_of(sizes: Mapping[str, int], servers: int) -> dict[str, int]:
    """Return the server that holds each parameter: whole parameters, about as many elements on each server."""
    return assign_owners(sizes, servers)


def server_sizes(sizes: Mapping[str, int], servers: int) -> list[int]:
    """Return the elements that each server holds."""
    found = [0] * servers
    for name, owner in server_of(sizes, servers).items():
        found[owner] += sizes[name]
    return found


def host_rank(server: int, workers: int) -> int:
    """Return the rank of the worker beside which a server runs, on the same host."""
    return server % workers
