"""Challenge by which a worker and a parameter server prove to each other that they know the run's token.

    server   CHALLENGE {nonce}                              32 random bytes
    worker   HELLO {nonce, rank, proof}                     proof: HMAC-SHA256 over both nonces and the rank
    server   WELCOME {proof, ...}, or WRONG and the end

The token itself is never sent. Proofs of the two sides differ, so that neither can be sent back to its author. Frames
after that are neither signed nor encrypted: they are for the loopback device, or for a network that others cannot use.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
from typing import Any

from shardwise.errors import RequestError
from shardwise.parallel.servers.frames import BadFrame, Frame, Kind, receive_frame, send_frame

TOKEN_SETTING = "SHARDWISE_TOKEN"
"""Environment variable with a run's token; without it, worker 0 draws one."""

LEAST_TOKEN = 16
"""Least number of characters of a token."""

LARGEST_GREETING = 64 * 2**10
"""Largest number of bytes of a frame before both sides have proved that they know the token."""

GREETING_SECONDS = 20.0
"""Seconds that the other side may take to prove itself."""


class Refused(Exception):
    """The other side does not know the token, or does not speak this protocol."""


def chosen_token() -> str:
    """Return the token in the environment, or a new one of 256 random bits. Raises RequestError if it is too short."""
    token = os.environ.get(TOKEN_SETTING)
    if token is None:
        return secrets.token_hex(32)
    if len(token) < LEAST_TOKEN:
        raise RequestError(
            f"{TOKEN_SETTING} has {len(token)} characters: use {LEAST_TOKEN} or more that nobody can guess, or leave "
            "it out"
        )
    return token


def prove(token: str, side: str, *parts: Any) -> str:
    """Return the proof that `side` knows the token, over both nonces and the rank."""
    text = "\n".join(map(str, (side, *parts)))
    return hmac.new(token.encode(), text.encode(errors="replace"), hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    """Return whether two proofs are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode(), other.encode(errors="replace"))


def admit(line: socket.socket, token: str) -> tuple[int, str]:
    """Challenge whoever connected. Returns the worker's rank, and our proof for the welcome.

    Raises:
        Refused: it does not know the token, or does not speak this protocol.
        OSError, EOFError: the connection breaks, or it takes too long.
    """
    nonce = secrets.token_hex(32)
    line.settimeout(GREETING_SECONDS)
    send_frame(line, Frame(Kind.CHALLENGE, {"nonce": nonce}))
    try:
        hello = receive_frame(line, LARGEST_GREETING)
    except BadFrame as error:
        raise Refused(str(error)) from None
    theirs, rank, proof = (hello.facts.get(key) for key in ("nonce", "rank", "proof"))
    known = isinstance(theirs, str) and type(rank) is int and isinstance(proof, str) and hello.kind == Kind.HELLO
    if not known or not _same(prove(token, "worker", nonce, theirs, rank), str(proof)):
        send_frame(line, Frame(Kind.WRONG, {"error": "the token is another one"}))
        raise Refused("the token is another one")
    line.settimeout(None)
    return int(str(rank)), prove(token, "server", theirs, nonce, rank)


def greet(line: socket.socket, token: str, rank: int) -> dict[str, Any]:
    """Answer a server's challenge, and check that it knows the token too. Returns the facts of its welcome.

    Raises:
        Refused: either side refuses the other.
        OSError, EOFError: the connection breaks, or the server takes too long.
    """
    line.settimeout(GREETING_SECONDS)
    mine = secrets.token_hex(32)
    try:
        theirs = receive_frame(line, LARGEST_GREETING).facts.get("nonce")
        send_frame(
            line, Frame(Kind.HELLO, {"nonce": mine, "rank": rank, "proof": prove(token, "worker", theirs, mine, rank)})
        )
        welcome = receive_frame(line, LARGEST_GREETING)
    except BadFrame as error:
        raise Refused(str(error)) from None
    if welcome.kind == Kind.WRONG:
        raise Refused(str(welcome.facts.get("error")))
    proof = str(welcome.facts.get("proof"))
    if not _same(prove(token, "server", mine, theirs, rank), proof):
        raise Refused("the server does not know the token")
    line.settimeout(None)
    return welcome.facts
