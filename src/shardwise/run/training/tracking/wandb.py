"""Runs of Weights & Biases. Without an account they are written to the run's folder alone (mode `offline`).

The variables of wandb itself choose the rest: WANDB_MODE, WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, ...
"""

from __future__ import annotations

import contextlib
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shardwise.run.training.tracking.tracker import TrackedRun

NAME, OFFLINE = "wandb", "offline"
PROJECT = "shardwise"
"""Name of the project if WANDB_PROJECT is not set."""

STEP = "step"
"""Name of the value over which wandb draws all others: a resumed run may record a step again, wandb's own only grow."""


class WandbRun:
    """Run of Weights & Biases; a resumed run has the id of the one before.

    Args:
        run: the run to track.

    Raises:
        Exception: wandb cannot open it; so may all methods.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        _stay_offline()
        identity = run.identity(NAME) or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
            id=identity,
            resume="allow",
            reinit="create_new",
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=run.quiet),
        )
        run.keep_identity(NAME, identity)
        self._run.define_metric("*", step_metric=STEP)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""
        self._run.log({STEP: step, **values})

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of an evaluation."""
        self.step(step, values)

    def close(self, *, failed: bool) -> None:
        """End the run with exit code 1 if it failed, and wait until wandb has written everything."""
        self._run.finish(exit_code=int(failed))


def _stay_offline() -> None:
    """Choose the mode `offline` if WANDB_MODE is not set and wandb knows no account of the user.

    wandb itself would refuse to begin, or ask for a key on the terminal. In this mode it sends no reports of errors
    either. It reads these variables when it is first used, so that an argument of `wandb.init` would come too late.
    """
    if "WANDB_MODE" not in os.environ and not _has_account():
        os.environ["WANDB_MODE"] = OFFLINE
    if os.environ.get("WANDB_MODE") == OFFLINE:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _has_account() -> bool:
    """Return whether the environment or the user's netrc file has a key for wandb's server."""
    import wandb

    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    hosts = (urlsplit(str(wandb.Settings().base_url)).netloc, "api.wandb.ai")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(path)
        return any(known.authenticators(host) for host in hosts)
    return False
