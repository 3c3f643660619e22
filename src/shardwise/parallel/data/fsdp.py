"""Fully sharded data parallelism: torch's `fully_shard`, block by block, with the root last.

A parameter is split along its first dimension over the workers of the `fsdp` axis, and `dp` replicates the shards
(HSDP). Gradients are means over all of these workers; each worker has its own rows.

0-d parameters cannot be split, and those that stay in float32 cannot be gathered with others in bfloat16: both stay
whole, and their gradients are averaged here. A parameter that a replica does
not use gets a gradient of zero. But each block must run on all replicas or on none, whatever the samples, because the
replicas gather it together (`blocks` leaves out modules that it sees some samples skip).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import _get_gradient_divide_factors

from shardwise.errors import StrategyError
from shardwise.parallel.data.joining import Joining
from shardwise.parallel.data.own_step import ForwardWatch, StepRoot
from shardwise.parallel.data.reducer import Flat, Reducer, joined
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.dtensor_rows import is_split
from shardwise.strategy import Strategy
from shardwise.workload.pytree import map_tensors

NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Parameters are cast before they are gathered; their gradients add up in float32."""


class ShardedModel:
    """Model whose parameters are split. `call` is the model itself, or the root around it of a step of one's own."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        mesh: Mesh,
        joining: Joining,
        root: StepRoot | None = None,
        *,
        narrow: bool = False,
        whole: Collection[str] = (),
    ) -> None:
        check_dtypes(model.parameters(), mesh.strategy)
        for block in blocks:
            _return_no_views(block)
        self.call: nn.Module = root or model
        self._left = frozenset(name for name, p in model.named_parameters() if p.dim() == 0 or name in whole)
        parameters = dict(model.named_parameters())
        split_parameters(self.call, blocks, mesh, [parameters[name] for name in self._left], joining, narrow=narrow)
        self._model = model
        self._replicas, self._reducer = mesh.strategy.replicas, joining.whole
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        for group in parameter_groups(self.call):
            join_by(group, joining, self._names.__getitem__)
        self._used: set[str] = set()
        self.unused: list[str] = []
        watch = ForwardWatch(self.call)
        for group in parameter_groups(self.call):
            group.post_backward = self._filled(group, group.post_backward)
            group.pre_backward = watch.after(group.pre_backward)

    @cached_property
    def _whole(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name that are not split.

        Computed late: until the first step they may be replaced.
        """
        named = self._model.named_parameters()
        return {name: parameter for name, parameter in named if name in self._left and parameter.requires_grad}

    @contextmanager
    def microbatch(self, first: bool, last: bool) -> Iterator[None]:
        """Surround the forward and backward pass of a microbatch.

        Each one reduces its gradients, so that they stay split.
        """
        if first:
            self._used.clear()
        yield
        if last:
            self.average_whole()
            trained = (name for parameter, name in self._names.items() if parameter.requires_grad)
            self.unused = [name for name in trained if name not in self._used]

    def before_backward(self, loss: Tensor) -> None:
        """Do nothing: `fully_shard` waits in Python, where all waits are noted."""

    def reshard(self) -> None:
        """Free the gathered parameters, see the function `reshard`."""
        reshard(self.call)

    def average_whole(self) -> None:
        """Average the gradients of parameters that are not split. Collective over the replicas."""
        if not self._whole:
            return
        self._used.update(name for name, parameter in self._whole.items() if parameter.grad is not None)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self._whole.items()}
        joined(self._reducer, gradients)
        for name, parameter in self._whole.items():
            parameter.grad = gradients[name].div_(self._replicas)

    def _filled(self, group: Any, post_backward: Callable[..., None]) -> Callable[..., None]:
        """Give unused parameters of a replica a gradient of zero before the gradients are reduce-scattered.

        Otherwise the replicas would send messages of different lengths.
        """

        def filled(*unused: Any) -> None:
            if group.is_unsharded:
                for part in group.fsdp_params:
                    self._fill(part)
            post_backward(*unused)

        return filled

    def _fill(self, part: Any) -> None:
        parameter = getattr(part, "_unsharded_param", None)  # it does not exist before the first forward pass
        if parameter is None or not parameter.requires_grad:
            return
        if parameter.grad is not None or part.unsharded_accumulated_grad is not None:
            self._used.add(self._names[part.sharded_param])
        else:
            parameter.grad = torch.zeros_like(parameter)


def _return_no_views(block: nn.Module) -> None:
    """Make `block` clone an output that is a view.

    An in-place operation on the view would silently drop the hook that gathers the parameters again.
    """
    original = block.forward

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor._is_view() and tensor.requires_grad else tensor

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return own(output) if isinstance(output, Tensor) else map_tensors(own, output)

    block.forward = forward


def parameter_groups(model: nn.Module) -> list[Any]:
    """Return torch's groups of parameters that are gathered together (one per module before torch 2.12)."""
    groups: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def split_parameters(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    whole: Iterable[nn.Parameter],
    joining: Joining,
    *,
    narrow: bool = False,
) -> None:
    """Apply `fully_shard` to `blocks` and then to `root`, except for the parameters `whole`.

    With `narrow`, float32 parameters are gathered in bfloat16. Their gradients add up in float32, and are reduced in
    the dtype of the reducers. Reducers that are not torch's own still have to be set (`join_by`).
    """
    # nothing writes into the returned tensors: blocks return no views, sections of a graph clone what they would
    # write into, and the loss does not change the model's own output
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    strategy = mesh.strategy
    assert mesh.grid is not None
    options: dict[str, Any] = {
        "mesh": mesh.grid["dp", "fsdp"] if strategy.dp > 1 and joining.mirrored is None else mesh.grid["fsdp"],
        "offload_policy": CPUOffloadPolicy(mesh.device.type == "cuda") if strategy.offload else OffloadPolicy(),
        "mp_policy": NARROW if narrow else MixedPrecisionPolicy(),
        "ignored_params": set(whole) or None,
    }
    for block in blocks:
        fully_shard(block, reshard_after_forward=strategy.zero == 3, **options)
    # by torch's default only the root stays gathered after its forward pass: its backward pass starts right then
    fully_shard(root, reshard_after_forward=None if strategy.zero == 3 else False, **options)
    assert joining.scattered is not None
    if joining.scattered.dtype is not None:
        for group in parameter_groups(root):
            group._init_mp_dtypes = partial(_reduce_in, joining.scattered.dtype, group, group._init_mp_dtypes)


def _reduce_in(dtype: torch.dtype, group: Any, settle: Callable[[], None]) -> None:
    """Settle the dtypes of a group, with a reduction in `dtype`.

    `MixedPrecisionPolicy.reduce_dtype` would also be the dtype in which the gradients of several passes add up.
    """
    settle()
    group._reduce_dtype = dtype


def join_by(group: Any, joining: Joining, name_of: Callable[[nn.Parameter], str]) -> None:
    """Let the reducers of `joining` join the gradients of one of torch's groups of parameters, unless torch can.

    Args:
        group: parameters that are gathered together.
        joining: the reducers.
        name_of: returns the name of a split parameter.
    """
    scattered, mirrored = joining.scattered, joining.mirrored
    assert scattered is not None
    if scattered.native and mirrored is None:
        return
    contents = _Contents(group, name_of)
    if not scattered.native:
        group._reduce_scatter_comm = _Scattering(scattered, contents)
    if mirrored is not None:

        def mirror(part: Tensor) -> None:
            after = _factors(group._reduce_scatter_process_group, part)[1]  # by which torch divides the part later
            mirrored.all_reduce(part.div_(after), contents.own(), mean=True).wait()
            part.mul_(after)

        group._all_reduce_hook = mirror


class _Contents:
    """Contents of a group's flat gradients: `fully_shard` leaves out parameters without a gradient.

    Args:
        group: torch's group of parameters.
        name_of: returns the name of a split parameter.
    """

    def __init__(self, group: Any, name_of: Callable[[nn.Parameter], str]) -> None:
        self._name_of = name_of
        self._given: tuple[Any, ...] = ()
        self._kept: dict[tuple[int, tuple[Any, ...]], Flat] = {}
        post_backward = group.post_backward

        def noted(*unused: Any) -> None:
            self._given = tuple(part for part in group.fsdp_params if _has_gradient(part))
            post_backward(*unused)

        group.post_backward = noted

    def of_all(self, ranks: int) -> Flat:
        """Return the contents before the reduce-scatter."""
        return self._flat(ranks, lambda part: part._orig_size)

    def own(self) -> Flat:
        """Return the contents of this worker's part."""
        return self._flat(0, lambda part: part.padded_sharded_param_size)

    def _flat(self, ranks: int, size_of: Callable[[Any], Sequence[int]]) -> Flat:
        key = ranks, self._given
        if key not in self._kept:
            names = tuple(self._name_of(part.sharded_param) for part in self._given)
            self._kept[key] = Flat(names, tuple(tuple(size_of(part)) for part in self._given), ranks)
        return self._kept[key]


def _has_gradient(part: Any) -> bool:
    parameter = getattr(part, "_unsharded_param", None)  # it does not exist before the first forward pass
    return parameter is not None and (parameter.grad is not None or part.unsharded_accumulated_grad is not None)


class _Scattering(ReduceScatter):
    """Reduce-scatter of torch's `fully_shard` by a reducer.

    Args:
        reducer: the reducer.
        contents: contents of the flat gradients that are scattered.
    """

    def __init__(self, reducer: Reducer, contents: _Contents) -> None:
        self._reducer, self._contents = reducer, contents

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a flat gradient."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write this worker's part of the mean of the flat gradients, as torch scales it."""
        before, after = _factors(group, input_tensor)
        input_tensor.mul_(before)
        self._reducer.reduce_scatter(output_tensor, input_tensor, self._contents.of_all(dist.get_world_size(group)))
        output_tensor.mul_(after)


def _factors(group: dist.ProcessGroup, flat: Tensor) -> tuple[float, float]:
    """Return the factors by which `fully_shard` divides gradients before and after its reduce-scatter.

    They are 1 in float32 and bfloat16, where it asks for a mean.
    """
    before, after, *_ = _get_gradient_divide_factors(group, None, flat.dtype, flat.device.type)
    return before or 1.0, after or 1.0


def gather_next(root: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Make each block prefetch the one that follows in the backward pass, and the last one in that order none.

    By default the last one would prefetch a block again when the passes of several microbatches alternate.
    """
    chain = [block for block in blocks if any(map(is_split, block.parameters()))]
    if any(map(is_split, root.parameters(recurse=False))):
        chain.append(root)
    following: Any = None
    for block in chain:
        module: Any = block  # `fully_shard` adds this method
        module.set_modules_to_backward_prefetch([following or module])
        following = module


def check_dtypes(parameters: Iterable[nn.Parameter], strategy: Strategy) -> None:
    """Raise StrategyError if the trained parameters have several dtypes, which cannot be gathered together."""
    dtypes = sorted({str(parameter.dtype) for parameter in parameters if parameter.requires_grad})
    if len(dtypes) > 1:
        raise StrategyError(
            f"fsdp={strategy.fsdp} needs trained parameters of one dtype, the model has {' and '.join(dtypes)}: "
            f"use dp={strategy.replicas}, or one dtype"
        )


def reshard(root: nn.Module) -> None:
    """Free gathered parameters, which would be out of date once the split ones are written to."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
