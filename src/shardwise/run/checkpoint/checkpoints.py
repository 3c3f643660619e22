"""Checkpoints of a run: written in the background, and read under any strategy by any number of workers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as read_checkpoint
from torch.distributed.checkpoint.state_dict_saver import async_save

from shardwise.errors import CheckpointError
from shardwise.parallel.engine import Engine
from shardwise.parallel.optim.delayed import GRADIENT
from shardwise.parallel.optim.making import name_of
from shardwise.parallel.optim.update import OPTIMIZER
from shardwise.parallel.program import LOCAL, OUTER
from shardwise.parallel.state.layout import TensorPiece
from shardwise.run.checkpoint.folder import complete, damage, final_path, newest_whole, step_of
from shardwise.run.checkpoint.headers import header_problem
from shardwise.run.checkpoint.index import Index
from shardwise.run.checkpoint.reader import FolderReader, TileLoadPlanner
from shardwise.run.checkpoint.restored import unlike
from shardwise.run.checkpoint.writer import PIECES, FolderWriter, Stager, TileSavePlanner
from shardwise.run.control_group import Vote, Workers
from shardwise.run.jsonfile import short


class Checkpointed(Protocol):
    """Interface that a checkpoint needs from a program; `parallel.program.Program` implements it."""

    steps: int

    @property
    def engine(self) -> Engine: ...  # noqa: D102
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...  # noqa: D102
    def pieces(self) -> list[TensorPiece]: ...  # noqa: D102
    def saved_pieces(self) -> list[TensorPiece]: ...  # noqa: D102
    def replica_in(self, state: Mapping[str, Any]) -> int | None: ...  # noqa: D102
    def optimizer_piece(  # noqa: D102
        self, parameter: str, state: str, global_shape: Sequence[int], dtype: torch.dtype
    ) -> TensorPiece | None: ...
    def state(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class Checkpoints:
    """Checkpoints of one run, in its subfolder `checkpoints`, which all workers must see.

    At most one is being written at a time. Every method but `wait` is collective if there is a process group.

    Attributes:
        folder: folder of the checkpoints.
        keep: number of newest checkpoints to keep.
        protected: steps whose checkpoints are kept in addition; each save uses the set as it is at that time.

    Raises:
        CheckpointError: `keep` is below 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least the newest checkpoint stays, use 1 or more")
        self.folder, self.keep = Path(folder) / "checkpoints", keep
        self.protected: set[int] = set()
        self._stager = Stager()
        self._pending: Future[Any] | None = None
        self._met: Workers | None = None
        self._voters: Workers | None = None
        self._vote: Vote | None = None

    def save(self, program: Checkpointed, progress: dict[str, Any]) -> None:
        """Copy the program's tensors, and write them in the background while the training goes on.

        Waits for the previous checkpoint first, and raises its error (see `wait`). `progress` must be JSON-able.
        """
        self.wait()
        workers, optimizer, pieces = self._workers(), program.optimizer, program.saved_pieces()
        index = Index(
            tensors={},
            aliases=dict(program.engine.aliases),
            progress=json.loads(json.dumps(progress)),  # a copy, because the training will change it
            state=json.loads(json.dumps(program.state())),
            optimizer="" if optimizer is None else name_of(optimizer),
            random=bytes(torch.get_rng_state().tolist()).hex(),
        )
        writer = FolderWriter(
            final_path(self.folder, program.steps), index, self.keep, workers, frozenset(self.protected)
        )
        self._pending = _start(pieces, writer, self._stager)

    def poll(self) -> None:
        """Raise the error of the last save soon after it happened, on all workers before the same step.

        It is called before every step and never waits for a write: each call starts an all-reduce of whether the write
        has ended, and the next call reads the result. Once the write has ended on all workers, its error is known to
        all of them.

        Raises:
            ShardwiseError: see `wait`.
        """
        if self._pending is None:
            return
        vote, self._vote = self._vote, None
        if vote is not None and vote.unanimous():
            self.wait()
        else:
            assert self._voters is not None
            self._vote = self._voters.vote(self._pending.done())

    def wait(self) -> None:
        """Wait until the last checkpoint is complete on disk.

        Raises:
            ShardwiseError: a worker could not write it; raised on all workers, with the rank and the reason.
        """
        vote, self._vote = self._vote, None
        if vote is not None:
            vote.unanimous()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self, *, finite: bool = False) -> Path | None:
        """Return the newest undamaged checkpoint. Returns None if there are no checkpoints; warns about skipped ones.

        Only rank 0 looks, so that all workers take one and the same checkpoint, and its bytes are read once.

        Args:
            finite: skip checkpoints whose weights or loss are not finite.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged, or not finite.
        """
        workers, found, problem = self._workers(), "", ""
        if workers.rank == 0:
            try:
                path = newest_whole(self.folder, not_finite if finite else lambda _: "")
                found = "" if path is None else path.name
            except CheckpointError as error:
                problem = str(error)
        workers.raise_first(problem, CheckpointError)
        found = workers.exchange(found)[0]
        return self.folder / found if found else None

    def last_finite(self) -> Path | None:
        """Return the newest undamaged checkpoint whose weights and loss are finite. Returns None if there is none."""
        workers, found = self._workers(), ""
        if workers.rank == 0:
            finite = (path for path in complete(self.folder) if not (damage(path) or not_finite(path)))
            found = next((path.name for path in finite), "")
        found = workers.exchange(found)[0]
        return self.folder / found if found else None

    def load(self, program: Checkpointed, path: Path) -> dict[str, Any]:
        """Fill the program from a checkpoint of any strategy, and return the progress that was given to `save`.

        The state of torch's CPU random number generator is restored too.

        Raises:
            CheckpointError: a file is damaged, or the checkpoint is of another model or optimizer. The program is then
                unchanged.
        """
        self.wait()
        workers = self._workers()
        workers.raise_first(damage(path, workers.rank, workers.count), CheckpointError)
        index = workers.all_or_none(lambda: Index.read(path), CheckpointError)
        workers.raise_first(header_problem(path, index, workers.rank, workers.count), CheckpointError)
        index = index.of_replica(program.replica_in(index.state))
        pieces = {piece.name: piece for piece in program.pieces() if _is_needed(piece, index)}
        now = program.state()  # collective, unlike the comparison
        workers.raise_first(_mismatch(path, index, pieces, program.optimizer, now), CheckpointError)
        _check_all_held(path, index, pieces, workers)
        states = workers.all_or_none(lambda: _optimizer_pieces(path, index, program), CheckpointError)
        _read(path, index, {name: piece for name, piece in pieces.items() if name in index.tensors} | states)
        program.load_state(index.state)
        torch.set_rng_state(_random_state(index))
        return index.progress

    def _workers(self) -> Workers:
        """Return the group for checkpoints; it is created at the first use. Collective at the first use."""
        if self._met is None:
            # the writing thread uses the first group while votes use the second
            self._met, self._voters = Workers(), Workers()
        return self._met


def not_finite(folder: Path) -> str:
    """Return a message if the weights or the loss of a checkpoint are not finite, else an empty string."""
    finite = Index.read(folder).progress.get("finite", True)
    return "" if finite else f"checkpoint {folder} is not finite: its weights or its loss are inf or nan"


def _start(pieces: list[TensorPiece], writer: FolderWriter, stager: Stager) -> Future[Any]:
    _expect_single_process()
    response = async_save(
        {PIECES: pieces},
        storage_writer=writer,
        planner=TileSavePlanner(),
        process_group=writer.workers.group,
        async_stager=stager,
        use_collectives=False,  # torch's collectives would unpickle data of other workers
    )
    assert isinstance(response, Future)
    return response


def _read(path: Path, index: Index, pieces: dict[str, TensorPiece]) -> None:
    _expect_single_process()
    # each worker plans and reads on its own, like a single process
    try:
        read_checkpoint(
            {PIECES: list(pieces.values())},
            storage_reader=FolderReader(path, index),
            planner=TileLoadPlanner(),
            no_dist=True,
        )
    except CheckpointException as error:  # the files were checked a moment ago, so this is a new fault
        reason = next(iter(error.failures.values()))[0]
        if not isinstance(reason, (OSError, SafetensorError)):
            raise
        raise CheckpointError(f"checkpoint {path} cannot be read any more: {reason}") from None


def _expect_single_process() -> None:
    """Silence torch's warning that it works as a single process, which is intended here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _optimizer_pieces(path: Path, index: Index, program: Checkpointed) -> dict[str, TensorPiece]:
    """Return this worker's pieces of the optimizer states in the checkpoint, by name; missing ones are created.

    Raises:
        CheckpointError: a state has another shape or dtype than in the checkpoint.
    """
    found = {}
    for name, stored in index.tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, state = rest.rpartition("/")
            piece = program.optimizer_piece(parameter, state, stored.spec.shape, stored.spec.dtype)
            if piece is None:
                continue
            if (piece.layout.shape, piece.local.dtype) != (stored.spec.shape, stored.spec.dtype):
                there = f"{stored.spec.dtype} of shape {stored.spec.shape}"
                here = f"{piece.local.dtype} of shape {piece.layout.shape}"
                raise CheckpointError(f"checkpoint {path} has {rest} as {there}, here it is {here}")
            found[name] = piece
    return found


def _is_needed(piece: TensorPiece, index: Index) -> bool:
    """Return whether a program cannot begin without a piece: an outer optimizer, or a delay, can begin anew."""
    return piece.name in index.tensors or not piece.name.startswith((OUTER, f"{GRADIENT}/"))


def _mismatch(
    path: Path,
    index: Index,
    pieces: Mapping[str, TensorPiece],
    optimizer: torch.optim.Optimizer | None,
    now: Mapping[str, Any],
) -> str:
    """Return one line on the first thing in the checkpoint that does not fit this worker, else an empty string."""
    # a fresh optimizer has no state yet, and a training without local steps or delay none of these
    known = {key: value for key, value in now.items() if key not in (OPTIMIZER, LOCAL, GRADIENT)}
    return _other_model(path, index, pieces, optimizer) or _other_state(path, index, known)


def _other_state(path: Path, index: Index, now: dict[str, Any]) -> str:
    """Return one line on state besides tensors that cannot be restored, else an empty string."""
    problem = _state_problem(path, index, now)
    return f"checkpoint {path} is damaged: index.json: {problem}" if problem else ""


def _state_problem(path: Path, index: Index, now: dict[str, Any]) -> str:
    if missing := sorted(now.keys() - index.state.keys()):
        return f"there is no {missing[0]!r} of the training's state"
    if problem := unlike(now, index.state, "state"):
        return problem
    if index.state["steps"] != step_of(path):
        return f"it is of step {short(index.state['steps'])}"
    try:
        _random_state(index)
    except (ValueError, RuntimeError):
        return "the state of the random numbers is none"
    return ""


def _random_state(index: Index) -> Tensor:
    """Return the checkpoint's state of torch's CPU generator. Raises ValueError or RuntimeError if it is invalid."""
    state = torch.tensor(list(bytes.fromhex(index.random)), dtype=torch.uint8)
    torch.Generator().set_state(state)
    return state


def _other_model(
    path: Path, index: Index, pieces: Mapping[str, TensorPiece], optimizer: torch.optim.Optimizer | None
) -> str:
    """Return one line if a tensor of the model, or the optimizer, differs from this program's, else an empty string."""
    for name, piece in pieces.items():
        plain, stored = name.removeprefix("model/"), index.tensors.get(name)
        if stored is None and name.startswith("owed/"):  # of a training that did not compress: nothing is owed
            continue
        if stored is None and name.startswith("average/"):
            return f"checkpoint {path} has no moving average of the weights: go on without `average` in the workload"
        if stored is None:
            return f"checkpoint {path} is of another model: it has no {plain}, here of shape {piece.layout.shape}"
        if stored.spec.shape != piece.layout.shape:
            return (
                f"checkpoint {path} is of another model: {plain} has shape {stored.spec.shape} there "
                f"and {piece.layout.shape} here"
            )
        if stored.spec.dtype != piece.local.dtype:
            return f"checkpoint {path} has {plain} as {stored.spec.dtype}, here it is {piece.local.dtype}"
    name = "" if optimizer is None else name_of(optimizer)
    if name and index.optimizer and name != index.optimizer:
        return f"checkpoint {path} is of a training with {index.optimizer}, here it is {name}: use the same optimizer"
    return ""


def _check_all_held(path: Path, index: Index, pieces: Mapping[str, TensorPiece], workers: Workers) -> None:
    """Check that each model tensor of the checkpoint is held by some worker. Collective. Raises CheckpointError."""
    names = [name for name in index.tensors if name.startswith("model/")]
    held = workers.anywhere([name in pieces for name in names])
    for name, somewhere in zip(names, held, strict=True):
        if not somewhere:
            plain, shape = name.removeprefix("model/"), index.tensors[name].spec.shape
            raise CheckpointError(
                f"checkpoint {path} is of another model: it has {plain} of shape {shape}, which is not here"
            )
