"""State that forward and backward passes may change besides gradients, and how to put it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.state.build_model import untouched
from shardwise.workload.reading.draws import draw_state, restore_draws
from shardwise.workload.trace.evolving import functions_of
from shardwise.workload.trace.python_state import PythonState
from shardwise.workload.workload import Workload


@contextmanager
def passes_undone(workload: Workload, model: nn.Module, buffers: Iterable[Tensor] = ()) -> Iterator[None]:
    """Undo what passes inside the block change besides gradients.

    That is what they leave in buffers, in Python values of modules (`self.calls += 1`) and of the workload's functions,
    and in the random generators of Python, NumPy and torch.

    Args:
        workload: workload whose functions the passes call.
        model: module whose Python code the passes run.
        buffers: further tensors that the passes may change.
    """
    called = functions_of(workload) if workload.after_step is None else [*functions_of(workload), workload.after_step]
    functions = PythonState(nn.Module(), called)
    attributes = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    values = [(tensor, tensor.detach().clone()) for tensor in (*buffers, *attributes)]
    draws = draw_state()
    with random_state_kept(), untouched(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            functions.restore()
            restore_draws(draws)
