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

from shardwise.errors import StrategyError
from shardwise.parallel.data.gradient_reducer import sum_gradients
from shardwise.parallel.data.own_step import ForwardWatch, StepRoot
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
        split_parameters(self.call, blocks, mesh, [parameters[name] for name in self._left], narrow=narrow)
        self._model = model
        self._group, self._narrow = mesh.replica_group, bool(mesh.strategy.reduce)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._used: set[str] = set()
        self.unused: list[str] = []
        watch = ForwardWatch(self.call)
        for group in _parameter_groups(self.call):
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
        assert self._group is not None
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._whole.values()]
        sum_gradients(gradients, self._group, narrow=self._narrow)
        for parameter, gradient in zip(self._whole.values(), gradients, strict=True):
            parameter.grad = gradient.div_(dist.get_world_size(self._group))

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


def _parameter_groups(model: nn.Module) -> list[Any]:
    """Return torch's groups of parameters that are gathered together (one per module before torch 2.12)."""
    groups: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def split_parameters(
    root: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, whole: Iterable[nn.Parameter], *, narrow: bool = False
) -> None:
    """Apply `fully_shard` to `blocks` and then to `root`, except for the parameters `whole`.

    With `narrow`, float32 parameters are gathered in bfloat16. Their gradients add up in float32, and are reduced in
    float32 or as the strategy says.
    """
    # nothing writes into the returned tensors: blocks return no views, sections of a graph clone what they would
    # write into, and the loss does not change the model's own output
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    strategy = mesh.strategy
    assert mesh.grid is not None
    options: dict[str, Any] = {
        "mesh": mesh.grid["dp", "fsdp"] if strategy.dp > 1 else mesh.grid["fsdp"],
        "offload_policy": CPUOffloadPolicy(mesh.device.type == "cuda") if strategy.offload else OffloadPolicy(),
        "mp_policy": NARROW if narrow else MixedPrecisionPolicy(),
        "ignored_params": set(whole) or None,
    }
    for block in blocks:
        fully_shard(block, reshard_after_forward=strategy.zero == 3, **options)
    # by torch's default only the root stays gathered after its forward pass: its backward pass starts right then
    fully_shard(root, reshard_after_forward=None if strategy.zero == 3 else False, **options)
    for group in _parameter_groups(root) if strategy.reduce else ():
        group._init_mp_dtypes = partial(_reduce_in_bfloat16, group, group._init_mp_dtypes)


def _reduce_in_bfloat16(group: Any, settle: Callable[[], None]) -> None:
    """Settle the dtypes of a group, with a reduction in bfloat16.

    `MixedPrecisionPolicy.reduce_dtype` would also be the dtype in which the gradients of several passes add up.
    """
    settle()
    group._reduce_dtype = torch.bfloat16


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
