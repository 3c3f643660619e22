"""A Lightning module as a workload: its `training_step` and `configure_optimizers`, and arguments of the Trainer.

Lightning itself is not imported: any module with these two methods will do.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shardwise.errors import WorkloadError
from shardwise.workload.script_objects import loader_fields, optimizer_like, schedule_like
from shardwise.workload.workload import Workload

PRECISIONS: dict[str | int, str] = {
    **dict.fromkeys(("32-true", "32", 32), "float32"),
    **dict.fromkeys(("bf16-mixed", "bf16"), "autocast"),
    "bf16-true": "bf16",
}
"""Precision of Lightning's Trainer -> that of a workload."""


HOOKS = (
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"),
    *(
        "on_train_epoch_end",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_before_zero_grad",
    ),
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "configure_model", "setup"),
)
"""Methods of a module that the Trainer calls and may change the training by; nothing calls them here."""

LIBRARIES = ("pytorch_lightning", "lightning", "torch")
"""Packages whose own methods of these names do nothing."""


def workload(
    module: nn.Module,
    train_dataloader: DataLoader[Any],
    *,
    max_epochs: float = 1,
    gradient_clip_val: float | None = None,
    precision: str | int = "32-true",
    accumulate_grad_batches: int = 1,
    devices: int = 1,
    without: Sequence[str] = (),
    name: str = "",
    **fields: Any,
) -> Workload:
    """Return the workload of a Lightning module.

    Args:
        module: module with `training_step` and `configure_optimizers`; copies of it are trained.
        train_dataloader: loader of the training data.
        max_epochs: as of the Trainer.
        gradient_clip_val: as of the Trainer: largest norm of the gradient.
        precision: as of the Trainer: 32-true, bf16-mixed or bf16-true.
        accumulate_grad_batches: as of the Trainer; the batch of an update is so many times that of the loader.
        devices: devices that the Trainer used; each has batches of the loader's size.
        without: hooks of the module that may be left out, because they only log, say.
        name: name in runs and reports; by default the class of the module.
        fields: further fields of `Workload`, which take precedence. An `evaluation` needs `inputs` and `loss`.

    Raises:
        WorkloadError: the module has manual optimization, several optimizers or hooks, or the loader cannot be taken
            over.
    """
    if not getattr(module, "automatic_optimization", True):
        raise WorkloadError(
            f"{type(module).__name__} optimizes by itself: write its turns, see docs/workloads.md#turns"
        )
    if hooks := [each for each in HOOKS if each not in without and _is_own(module, each)]:
        raise WorkloadError(
            f"{type(module).__name__} has {', '.join(hooks)}, which nothing calls here: do it in training_step, or "
            f"name what the training does not need, without={hooks}"
        )
    if not isinstance(train_dataloader, DataLoader):
        raise WorkloadError(
            f"train_dataloader is a {type(train_dataloader).__name__}: give a DataLoader; a data module has it as "
            "train_dataloader(), after prepare_data() and setup('fit')"
        )
    if precision not in PRECISIONS:
        raise WorkloadError(f"precision={precision!r}: known are {', '.join(str(each) for each in PRECISIONS)}")
    optimizer, schedule = _configured(module)
    made = loader_fields(train_dataloader)
    made["batch_size"] *= accumulate_grad_batches * devices
    return Workload(
        **{
            "name": name or type(module).__name__,
            "model": lambda: _silent(copy.deepcopy(module)),
            "optimizer": optimizer_like(optimizer, module),
            "step": _step,
            "epochs": max_epochs,
            "clip_norm": gradient_clip_val or None,
            "precision": PRECISIONS[precision],
            **made,
            **schedule,
            **fields,
        }
    )


def _is_own(module: nn.Module, name: str) -> bool:
    """Return whether a module's method is not that of a library."""
    home = next((each for each in type(module).__mro__ if name in vars(each)), None)
    return home is not None and home.__module__.partition(".")[0] not in LIBRARIES


class _NoTrainer:
    """Trainer of a module that has none: a value of it would be wrong, such as epoch 0 for `self.current_epoch`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copies
            raise AttributeError(name)
        raise WorkloadError(f"the module asks its Trainer for {name}, and there is none: leave it out of training_step")


def _silent(module: nn.Module) -> nn.Module:
    """Let `self.log`, `self.log_dict` and `self.print` of a module do nothing: there is no Trainer."""
    for name in ("log", "log_dict", "print"):
        if hasattr(module, name):
            object.__setattr__(module, name, _nothing)
    return module


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, for `self.log`."""


def _step(module: Any, batch: Any) -> Tensor:
    if getattr(module, "_trainer", module) is None:  # at each step, because copies of a Lightning module lose it
        object.__setattr__(module, "_trainer", _NoTrainer())
    parameters = inspect.signature(module.training_step).parameters.values()
    takes_number = len(parameters) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters)
    result = module.training_step(batch, 0) if takes_number else module.training_step(batch)
    loss: Tensor = result["loss"] if isinstance(result, Mapping) else result
    return loss


def _configured(module: Any) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """Return what `configure_optimizers` made: an optimizer, and the fields of its scheduler. Raises WorkloadError."""
    made = module.configure_optimizers()
    schedulers: Any = None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Sequence):
        made, schedulers = made
    if isinstance(made, Mapping):
        made, schedulers = made["optimizer"], made.get("lr_scheduler")
    optimizers = list(made) if isinstance(made, Sequence) else [made]
    if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
        raise WorkloadError(
            f"configure_optimizers of {type(module).__name__} makes {len(optimizers)} optimizers: one is taken over, "
            "for several write a Workload with a list of them"
        )
    if isinstance(schedulers, Sequence):
        if len(schedulers) > 1:
            raise WorkloadError(f"configure_optimizers of {type(module).__name__} makes several schedulers: use one")
        schedulers = next(iter(schedulers), None)
    if schedulers is None:
        return optimizers[0], {}
    entry = schedulers if isinstance(schedulers, Mapping) else {"scheduler": schedulers}
    every = "metric" if entry.get("monitor") else entry.get("interval", "epoch")
    return optimizers[0], {"schedule": schedule_like(entry["scheduler"], optimizers[0]), "schedule_every": every}
