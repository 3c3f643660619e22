"""Choice of trackers by name, and opening of those that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from shardwise.errors import RequestError, nearest
from shardwise.run.training.run_folder import TENSORBOARD
from shardwise.run.training.tracking.mlflow import MlflowRun
from shardwise.run.training.tracking.tensorboard import EventFile
from shardwise.run.training.tracking.tracker import BackgroundTracker, GuardedTracker, TrackedRun, Tracker
from shardwise.run.training.tracking.wandb import WandbRun

NONE = "none"
"""Word that asks for no tracker at all."""


@dataclass(frozen=True, slots=True)
class KnownTracker:
    """Tracker that a run can have: its title, the module that it needs, and the extra that installs it."""

    title: str
    module: str
    extra: str


KNOWN = {
    "tensorboard": KnownTracker("TensorBoard", "tensorboard", "tensorboard"),
    "wandb": KnownTracker("Weights & Biases", "wandb", "wandb"),
    "mlflow": KnownTracker("MLflow", "mlflow", "mlflow"),
}

_IN_BACKGROUND: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def settle_trackers(track: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of the requested trackers, each once. Returns None if nothing is requested.

    Args:
        track: names, or a text with commas between them; `none`: no tracker; None: the default.

    Raises:
        RequestError: a name is not known, or the tracker's package is not installed.
    """
    if track is None:
        return None
    listed = track.split(",") if isinstance(track, str) else track
    if not isinstance(listed, list | tuple):
        raise RequestError(f"track={track}: give names, such as tensorboard,wandb")
    names = [str(name).strip() for name in listed]
    if names in ([], [NONE]):
        return ()
    for name in names:
        if name not in KNOWN:
            known = (*KNOWN, NONE)
            raise RequestError(f"track={name}: known are {', '.join(known)}{nearest(name, known)}")
        if not installed(name):
            known_as = KNOWN[name]
            raise RequestError(
                f"track={name}: {known_as.title} is not installed: pip install 'shardwise[{known_as.extra}]'"
            )
    return tuple(dict.fromkeys(names))


def installed(name: str) -> bool:
    """Return whether the package of a tracker is installed; a folder of its name, as wandb makes one, is none."""
    found = find_spec(KNOWN[name].module)
    return found is not None and found.origin is not None


def open_trackers(names: Sequence[str] | None, run: TrackedRun) -> list[Tracker]:
    """Open trackers for a run on this process; one that fails is reported in a warning.

    Args:
        names: the trackers to open, see `settle_trackers`; None: TensorBoard if it is installed.
        run: the run to track.
    """
    if names is None:
        names = [name for name in ("tensorboard",) if installed(name)]
    return [_opened(name, run) for name in names]


def _opened(name: str, run: TrackedRun) -> Tracker:
    title = KNOWN[name].title
    if name == "tensorboard":
        return GuardedTracker(title, lambda: EventFile(run.folder / TENSORBOARD, run.done))
    return BackgroundTracker(title, lambda: _IN_BACKGROUND[name](run))
