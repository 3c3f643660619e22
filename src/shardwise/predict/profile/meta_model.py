"""A workload's model as predictions trace it: without parameter memory, shortened if its layers repeat, traced once.

Parameters have no values, so that a model may be larger than this machine's memory. Only the first `SHORT` of a long
list of equal layers are traced; `predict.profile.deepen` extends the profile to all of them.

`torch._grouped_mm` (mixture of experts) accepts float32 and float16 too, on CPUs and GPUs, but its meta kernel, which
computes the shape of the result, rejects all dtypes but bfloat16. This module alone patches that kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, _meta_registrations, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

from shardwise.errors import DataError, WorkloadError
from shardwise.options import BF16
from shardwise.parallel.data.blocks import repeated_blocks, steady_modules
from shardwise.parallel.data.own_step import takes_derivatives
from shardwise.parallel.graph.trace import traced
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.pipeline.cut_points import CutPoint
from shardwise.parallel.state.build_model import evaluating, persistent_buffers, plain_model, untouched
from shardwise.predict.profile.optimizer import update_of
from shardwise.predict.profile.profile import Update
from shardwise.workload.data import first_samples
from shardwise.workload.own_step import run_step
from shardwise.workload.precision import computed, for_gpu, kept_of
from shardwise.workload.pytree import unlike
from shardwise.workload.trace.graph import StepGraph
from shardwise.workload.trace.repeated_layers import repeated_layers, shortened
from shardwise.workload.trace.stand_ins import stand_ins
from shardwise.workload.weight_files import without_parameters
from shardwise.workload.workload import Workload, call_model

SHORT = 4
"""Number of layers that are traced: the first one, two in the middle that must be equal, and the last one."""

_ALONE = 4
"""Number of samples that are passed one by one to find repeated blocks, as `parallel.data.module_engine` does."""

LARGE_BUFFER = 2**16
"""Bytes from which on a buffer's memory is allocated without being touched."""

_FILLS = {
    torch.ops.aten.normal_.default,
    torch.ops.aten.uniform_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
}
"""Initializers: on the meta device they change nothing but take a millisecond each."""


@dataclass(slots=True)
class Model:
    """A build of a workload's model, with a cache of what was traced from it.

    Attributes:
        workload: the workload that builds it.
        module: the plain module.
        device: kind of device that it is traced for, `gpu` or `cpu`.
        layers: a list of equal layers of which only the first `SHORT` are traced; None: the whole module is traced.
    """

    workload: Workload
    module: nn.Module
    device: str = "gpu"
    layers: nn.ModuleList | nn.Sequential | None = None
    evaluated: dict[tuple[int, int], Sequence[CutPoint]] = field(default_factory=dict)
    """(tp, sp) -> cut points of the evaluation graph."""
    _steps: dict[tuple[int, bool, str], StepGraph] = field(default_factory=dict)
    _steady: dict[int, set[nn.Module]] = field(default_factory=dict)
    _blocks: dict[int, list[list[str]]] = field(default_factory=dict)
    _update: Update | None = None

    @classmethod
    def of(cls, workload: Workload, module: nn.Module, device: str) -> Model:
        """Wrap a module without values; shorten it if it has a list of more than `SHORT` equal layers."""
        widen_grouped_products()
        layers = repeated_layers(module)
        repeats = layers is not None and len(layers) > SHORT and _kept_alike(workload, module, layers)
        return cls(workload, module, device, layers if repeats else None)

    @contextmanager
    def short(self) -> Iterator[nn.Module]:
        """Yield the module, which is shortened to its first `SHORT` layers while the context is open."""
        with nullcontext() if self.layers is None else shortened(self.layers, SHORT):
            yield self.module

    def lengthen(self) -> None:
        """Stop shortening: trace the whole module from here on, and drop all that was cached."""
        self.layers = None
        self._steps.clear()
        self.evaluated.clear()
        self._steady.clear()
        self._blocks.clear()

    def update(self) -> Update:
        """Return the optimizer's work and memory per element of a parameter, recorded once."""
        self._update = self._update or update_of(self.workload)
        return self._update

    def step(self, samples: int, precision: str = "", *, training: bool = True) -> StepGraph:
        """Return the graph of a step, traced once for each number of samples and precision.

        Call it while `short` is open. An empty precision is the workload's own.

        Raises:
            Untraceable: the step cannot be traced.
        """
        workload = replace(self.workload, precision=precision or self.workload.precision)
        key = samples, training, workload.precision
        if key not in self._steps:
            with for_gpu(self.device == "gpu"):
                self._steps[key] = traced(workload, self.module, batch(workload, samples), training=training)
        return self._steps[key]

    def evaluation(self, samples: int) -> StepGraph:
        """Return the graph of an evaluation: any one that is already traced, else trace it with `samples` samples."""
        known = (step for (_, training, _), step in self._steps.items() if not training)
        return next(known, None) or self.step(samples, training=False)

    def any_step(self) -> StepGraph:
        """Return the graph of a training step: any one that is already traced, else trace it with one sample."""
        known = (step for (_, training, _), step in self._steps.items() if training)
        return next(known, None) or self.step(1)

    def prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the parameter names of each repeated layer; empty if no layers are left out."""
        if self.layers is None:
            return ()
        path = next(name for name, module in self.module.named_modules() if module is self.layers)
        return tuple(f"{path}.{name}." if path else f"{name}." for name in self.layers._modules)

    def blocks(self, samples: int) -> list[list[str]]:
        """Return the parameter names of each repeated block: the units of `fully_shard` and of recomputation."""
        if samples not in self._blocks:
            self._blocks[samples] = self._found_blocks(samples)
        return self._blocks[samples]

    def _found_blocks(self, samples: int) -> list[list[str]]:
        with self.short() as module:
            steady = self._seen(module, 0) & self._seen(module, samples)
        steady = steady | self._like(steady)
        names = {tensor: name for name, tensor in self.module.named_parameters()}
        found = repeated_blocks(self.module, steady)
        return [[names[tensor] for tensor in block.parameters()] for block in found]

    def _like(self, steady: set[nn.Module]) -> set[nn.Module]:
        """Return the steady modules of the layers that are left out, inferred from a traced layer in the middle."""
        if self.layers is None:
            return set()
        like = self.layers[1]
        names = [name for name, module in like.named_modules() if module in steady]
        return {layer.get_submodule(name) for layer in list(self.layers)[SHORT:] for name in names}

    def _seen(self, module: nn.Module, samples: int) -> set[nn.Module]:
        """Return the modules that are steady in a pass of a batch of `samples` samples; 0: in passes of single samples.

        See `parallel.data.blocks.steady_modules`.
        """
        if samples not in self._steady:
            if samples:
                batches = [batch(self.workload, samples)]
            else:
                collate = self.workload.collate or default_collate
                batches = [collate([sample]) for sample in first_samples(self.workload.dataset, _ALONE) or []]
            empty = any(parameter.is_meta for parameter in module.parameters())
            passes = [partial(self._look, each) for each in (unlike(batches) if empty else batches)]
            with evaluating(module), untouched(module), random_state_kept():
                self._steady[samples] = steady_modules(module, passes)
        return self._steady[samples]

    def _look(self, data: Any) -> bool:
        with stand_ins(self.module, data) as (mode, given), mode or nullcontext():
            if self.workload.step is not None:
                return takes_derivatives(partial(run_step, self.workload, self.module, given))
            return takes_derivatives(partial(self.called, given, self.workload.precision))

    def called(self, data: Any, precision: str) -> Any:
        """Return the module's output for a batch, computed in a precision and given in float32."""
        module, inputs = self.module, self.workload.inputs
        kept = kept_of(precision, module, self.workload.float32)
        with for_gpu(self.device == "gpu"):
            return computed(precision, module.parameters(), lambda: call_model(module, inputs(data)), kept=kept)


def _kept_alike(workload: Workload, model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Return whether the same parts of all layers stay in float32."""
    kept = kept_of(BF16, model, workload.float32)
    parts = {*kept.modules, *kept.tensors()}
    return len({tuple(p in parts for p in (*layer.modules(), *layer.parameters())) for layer in layers}) == 1


def builds(workload: Workload, device: str = "gpu") -> Iterator[Model]:
    """Yield builds of the model without values, the fastest first: on the meta device, then without parameters' memory.

    The meta device is left out if the factory does not run on it. The values in `Workload.weights` are not read.
    """
    workload = replace(workload, weights=None)
    module = _on_meta(workload)
    if module is not None:
        yield Model.of(workload, module, device)
    with random_state_kept(), without_parameters():
        module = plain_model(workload)
    yield Model.of(workload, module, device)


def with_values(workload: Workload, device: str) -> Model:
    """Build the model with real values, for models that cannot be traced."""
    with random_state_kept():
        return Model(workload, plain_model(workload), device)


class _Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that skips initializers of tensors on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _FILLS and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


def _on_meta(workload: Workload) -> nn.Module | None:
    """Build the module on the meta device, except for its buffers, and restore the random state.

    Returns None if the factory cannot run there, for example because it computes with values of its tensors.
    """
    with random_state_kept():
        try:
            with torch.device("meta"), _Unfilled():  # type: ignore[no-untyped-call]
                model = plain_model(workload)
        except (RuntimeError, NotImplementedError, ValueError):
            return None
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # any values will do, but they must exist
                module._buffers[name] = _zeros(buffer)
    return model if all(parameter.is_meta for parameter in model.parameters()) else None


def _zeros(like: Tensor) -> Tensor:
    """Return zeros on the CPU, in the shape of a tensor. Pages of large ones take no memory or time until touched."""
    if like.nbytes < LARGE_BUFFER:
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    return torch.from_numpy(np.zeros(like.nbytes, dtype=np.uint8)).view(like.dtype).view(like.shape)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, in the order of the state dict; shared ones under one name."""
    known: dict[str, Tensor] = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return {name: known[name] for name in model.state_dict() if name in known}


def batch(workload: Workload, samples: int) -> Any:
    """Return a batch of the dataset's first `samples` samples, repeated from the start if it has fewer.

    Raises:
        WorkloadError: the dataset can be read only once.
        DataError: the dataset is empty.
    """
    found = first_samples(workload.dataset, samples)
    if found is None:
        raise WorkloadError(
            f"the dataset of workload {workload.name!r} can be read only once, and a prediction looks at a batch: "
            "give an iterable whose iter() starts anew"
        )
    if not found:
        raise DataError(f"the dataset of workload {workload.name!r} is empty: there is nothing to train on")
    return (workload.collate or default_collate)([found[index % len(found)] for index in range(samples)])


_SHAPES: Any = _meta_registrations


@cache
def widen_grouped_products() -> None:
    """Patch torch's meta kernel of grouped matmuls to accept any floating dtype, for the rest of the process.

    All other checks of the kernel stay in force. Repeated calls have no effect.
    """
    refusing = _SHAPES._meta_grouped_mm_common

    def shape_of(mat_a: Tensor, mat_b: Tensor, scale_a: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        dtype = mat_a.dtype
        if scale_a is not None or dtype != mat_b.dtype or dtype == torch.bfloat16 or not dtype.is_floating_point:
            return refusing(mat_a, mat_b, scale_a, *args, **kwargs)  # type: ignore[no-any-return]
        narrow = mat_a.to(torch.bfloat16), mat_b.to(torch.bfloat16)
        if kwargs.get("out_dtype") == dtype:
            kwargs["out_dtype"] = None
        return refusing(*narrow, scale_a, *args, **kwargs).to(dtype)  # type: ignore[no-any-return]

    _SHAPES._meta_grouped_mm_common = shape_of
