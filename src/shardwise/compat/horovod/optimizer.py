"""Distributed optimizer: any torch optimizer, whose gradients are reduced over all ranks while they are computed.

A hook on each parameter begins the reduction of its gradient as soon as the backward pass has it. `step` waits for all
of them. Parameters without a gradient on this rank take part with zeros, because other ranks may have one.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.compat.horovod import operations
from shardwise.compat.horovod.compression import Compressions, Compressor
from shardwise.compat.horovod.requests import ADASUM, AVERAGE
from shardwise.compat.horovod.world import ProcessSet, global_process_set, optimizer_number, size

Bucket = tuple[nn.Parameter, ...]
"""Parameters whose gradients are reduced at once."""


class _ReducedGradients(torch.optim.Optimizer):
    """Methods that `DistributedOptimizer` adds to the class of an optimizer."""

    def distribute(
        self,
        names: dict[nn.Parameter, str],
        buckets: Sequence[Bucket],
        *,
        compression: type[Compressor],
        passes: int,
        reduction: dict[str, Any],
        sparse_as_dense: bool,
    ) -> None:
        """Begin to reduce the gradients of the parameters in `names`."""
        self._names, self._buckets = names, {parameter: bucket for bucket in buckets for parameter in bucket}
        self._compression, self._reduction, self._sparse_as_dense = compression, reduction, sparse_as_dense
        self.backward_passes_per_step = passes
        self._passes: Counter[nn.Parameter] = Counter()
        self._flying: dict[Bucket, Callable[[], None]] = {}
        self._synchronized, self._should_synchronize = False, True
        process_set: ProcessSet = reduction["process_set"]
        self._active = size() > 1 and process_set.included()
        if self._active:
            for parameter in self._parameters():
                parameter.register_post_accumulate_grad_hook(self._computed)  # type: ignore[no-untyped-call]

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad)

    def _computed(self, parameter: Tensor) -> None:
        """Note a gradient, and begin to reduce it if it was the last of its bucket and of its backward passes."""
        assert isinstance(parameter, nn.Parameter)
        self._passes[parameter] += 1
        if self._passes[parameter] > self.backward_passes_per_step:
            raise AssertionError(
                f"the gradient of {self._names[parameter]} was computed more than backward_passes_per_step="
                f"{self.backward_passes_per_step} times before step(): increase it to accumulate gradients"
            )
        bucket = self._buckets[parameter]
        if all(self._passes[each] == self.backward_passes_per_step for each in bucket if each.requires_grad):
            self._send(bucket)

    def _send(self, bucket: Bucket) -> None:
        """Begin to reduce the gradients of a bucket, but for those of frozen parameters."""
        members = [parameter for parameter in bucket if parameter.requires_grad]
        for parameter in members:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse and self._sparse_as_dense:
                parameter.grad = parameter.grad.to_dense()
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        name = self._names[bucket[0]]
        if len(bucket) == 1 and gradients[0].is_sparse:
            self._flying[bucket] = self._sent_sparse(bucket[0], gradients[0], name)
            return
        sent, contexts = zip(*(self._compression.compress(gradient) for gradient in gradients), strict=True)
        handle = operations.grouped_allreduce_async_(sent, name=name, **self._reduction)

        def receive() -> None:
            for gradient, value, context in zip(gradients, operations.synchronize(handle), contexts, strict=True):
                if value is not gradient:
                    gradient.copy_(self._compression.decompress(value, context))

        self._flying[bucket] = receive

    def _sent_sparse(self, parameter: nn.Parameter, gradient: Tensor, name: str) -> Callable[[], None]:
        process_set, op = self._reduction["process_set"], self._reduction["op"]
        result = operations.sparse_allreduce_async(gradient, name, op, process_set)

        def receive() -> None:
            parameter.grad = result()

        return receive

    def synchronize(self) -> None:
        """Wait until all gradients are reduced."""
        if self._active:
            for parameter in self._parameters():
                bucket = self._buckets.setdefault(parameter, (parameter,))
                self._names.setdefault(parameter, f"{self._names_prefix}.added.{len(self._names)}")
                if bucket not in self._flying:
                    self._send(bucket)
            with torch.no_grad():
                for receive in self._flying.values():
                    receive()
        self._forget()
        self._synchronized = True

    def _forget(self) -> None:
        self._flying.clear()
        self._passes.clear()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` inside not reduce gradients, after a `synchronize` that was called to change them."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Set the number of backward passes whose gradients are added up before they are reduced."""
        self.backward_passes_per_step = passes
        self._passes.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait until all gradients are reduced, and update the parameters; a closure is called first, as in torch."""
        if closure is not None:
            return super().step(self._reduced_after(closure))
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize() reduces the gradients again: put it into "
                    "`with optimizer.skip_synchronize():`",
                    stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        return super().step()

    def _reduced_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def reduced() -> Any:
            loss = closure()
            self.synchronize()
            self._synchronized = False
            return loss

        return reduced

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. Raises AssertionError while they are being reduced."""
        if self._flying:
            raise AssertionError(
                "zero_grad() after backward() and before step() or synchronize(): the gradients are being reduced"
            )
        self._passes.clear()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of an optimizer, and forget gradients that were not reduced yet."""
        for receive in self._flying.values():
            receive()
        self._forget()
        super().load_state_dict(state_dict)

    @property
    def _names_prefix(self) -> str:
        return next(iter(self._names.values()), "optimizer").rpartition(".")[0]


class _AdasumUpdates(torch.optim.Optimizer):
    """Methods of an optimizer with op=Adasum: each rank steps by itself, and the updates are combined."""

    _process_set: ProcessSet
    _number: int

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with this rank's gradients, and combine the changes of all ranks by Adasum."""
        parameters = [each for group in self.param_groups for each in group["params"] if each.requires_grad]
        before = [each.detach().clone() for each in parameters]
        loss = super().step() if closure is None else super().step(closure)
        if not self._process_set.included():
            return loss
        with torch.no_grad():
            changes = [each - old for each, old in zip(parameters, before, strict=True)]
            operations.grouped_allreduce_(
                changes, name=f"optimizer.{self._number}", op=ADASUM, process_set=self._process_set
            )
            for each, old, change in zip(parameters, before, changes, strict=True):
                each.copy_(old + change)
        return loss

    def synchronize(self) -> None:
        """Do nothing: updates are combined, not gradients."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Raise AssertionError: with Adasum the combination is part of the step."""
        raise AssertionError("skip_synchronize() is not possible with op=Adasum: the step itself combines the updates")
        yield


def DistributedOptimizer(  # noqa: N802  Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    compression: type[Compressor] = Compressions.none,
    backward_passes_per_step: int = 1,
    op: str = AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[nn.Parameter]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return an optimizer of the same class and state, whose `step` uses the gradients of all ranks.

    Args:
        optimizer: a torch optimizer; use the returned one in its place.
        named_parameters: names of all its parameters, as `model.named_parameters()`.
        compression: how gradients are sent.
        backward_passes_per_step: backward passes whose gradients are added up before they are reduced.
        op: Average, Sum or Adasum.
        gradient_predivide_factor: part of the averaging that is done before the sum: gradients are divided by this
            factor before it, and by the number of ranks over this factor after it.
        num_groups: older form of `groups` as a number.
        groups: number of groups whose gradients are reduced at once, or lists of parameters.
        sparse_as_dense: reduce sparse gradients as dense ones.
        process_set: ranks that take part.

    Raises:
        ValueError: the names are no pairs, not unique or not all, an option is out of range, or options contradict
            each other.
    """
    if gradient_predivide_factor != 1.0 and op != AVERAGE:
        raise ValueError("gradient_predivide_factor needs op=Average")
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step={backward_passes_per_step}: must be 1 or more")
    names = _named(optimizer, named_parameters)
    number = optimizer_number()
    base = _AdasumUpdates if op == ADASUM else _ReducedGradients
    kind: Any = type(type(optimizer).__name__, (base, type(optimizer)), {})
    wrapped = kind.__new__(kind)
    # a scheduler that was made before has put a `step` of the old object into it
    wrapped.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    if op == ADASUM:
        wrapped.__dict__.update(_process_set=process_set, _number=number)
        return wrapped
    wrapped.distribute(
        {parameter: f"optimizer.{number}.{name}" for name, parameter in names},
        _buckets([parameter for _, parameter in names], groups if groups is not None else num_groups),
        compression=compression,
        passes=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense,
        reduction={
            "op": op,
            "prescale_factor": 1 / gradient_predivide_factor,
            "postscale_factor": gradient_predivide_factor,
            "process_set": process_set,
        },
    )
    return wrapped


def _named(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]] | None
) -> list[tuple[str, nn.Parameter]]:
    """Return all parameters of an optimizer with their names. Raises ValueError."""
    own = [
        (f"group{index}.{number}", parameter)
        for index, group in enumerate(optimizer.param_groups)
        for number, parameter in enumerate(group["params"])
    ]
    if named_parameters is None:
        return own
    named = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        raise ValueError("named_parameters must be pairs (name, parameter), such as model.named_parameters()")
    repeated = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if repeated:
        raise ValueError(f"named_parameters must have unique names, these stand several times: {', '.join(repeated)}")
    known = {parameter: name for name, parameter in named}
    missing = [place for place, parameter in own if parameter not in known]
    if missing:
        raise ValueError(f"named_parameters lacks {len(missing)} parameters of the optimizer, such as {missing[0]}")
    return [(known[parameter], parameter) for _, parameter in own]


def _buckets(parameters: Sequence[nn.Parameter], groups: int | Sequence[Sequence[nn.Parameter]]) -> list[Bucket]:
    """Return the parameters whose gradients are reduced at once. Raises ValueError."""
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError(f"groups={groups}: must be 0 or more")
        count = min(groups, len(parameters)) or len(parameters)
        size, more = divmod(len(parameters), max(count, 1))
        starts = [number * size + min(number, more) for number in range(count + 1)]
        return [tuple(parameters[start:end]) for start, end in itertools.pairwise(starts)]
    given = [tuple(group) for group in groups]
    if len({each for group in given for each in group}) != sum(map(len, given)):
        raise ValueError("groups: a parameter stands in several groups")
    grouped = {each for group in given for each in group}
    return [*given, *((parameter,) for parameter in parameters if parameter not in grouped)]
