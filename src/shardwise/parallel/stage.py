"""The part of a model that one worker holds of one pipeline stage, as modules, and what it computes for each shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from shardwise.parallel import selective
from shardwise.parallel.cuts import Use, positions
from shardwise.parallel.keyed import KeyedOperations
from shardwise.parallel.partitioner import LocalGraph
from shardwise.parallel.sections import Section, compiled, sections


@dataclass(frozen=True, slots=True)
class Piecework:
    """A section ready to run: what a block computes for one shape of the step."""

    section: Section
    function: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a stage computes for one shape of the step.

    Attributes:
        blocks: one after the other.
        inputs: values from other stages.
        outputs: values for other stages, or the results of the step.
    """

    blocks: tuple[Piecework, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What all stages compute for one shape of the step.

    Attributes:
        local: the worker's graph of the step.
        stages: by number; only the worker's own have compiled functions.
        home: value that goes from one stage to another -> the stage that makes it.
    """

    local: LocalGraph
    stages: tuple[StageWork, ...]
    home: Mapping[fx.Node, int] = field(repr=False)

    def messages(self, source: int, target: int) -> list[fx.Node]:
        """The values that stage `source` makes and stage `target` uses."""
        return [node for node in self.stages[target].inputs if self.home[node] == source]


def prepare(
    local: LocalGraph,
    cut: Sequence[Use],
    stage_blocks: Sequence[int],
    parameters: Collection[str],
    own: Collection[int],
) -> Work:
    """Cuts a step into blocks at `cut`, the first `stage_blocks[0]` of them the first stage, and so on."""
    parts = sections(local, positions(local, cut, parameters))
    stages: list[StageWork] = []
    home: dict[fx.Node, int] = {}
    first = 0
    for stage, count in enumerate(stage_blocks):
        mine = parts[first : first + count]
        for section in mine:
            home.update({node: stage for node in section.outputs if node not in home})
        stages.append(_stage_work(mine, parts[first + count :], local, compile_them=stage in own))
        first += count
    return Work(local, tuple(stages), home)


def _stage_work(mine: list[Section], later: list[Section], local: LocalGraph, *, compile_them: bool) -> StageWork:
    made = {node for section in mine for node in section.outputs}
    inputs = [node for section in mine for node in section.inputs if node not in made]
    wanted = {node for section in later for node in section.inputs}
    outputs = [node for section in mine for node in section.outputs if node in wanted] if later else mine[-1].outputs
    blocks = tuple(Piecework(section, compiled(section, local) if compile_them else _elsewhere) for section in mine)
    return StageWork(blocks, tuple(dict.fromkeys(inputs)), tuple(dict.fromkeys(outputs)) if later else tuple(outputs))


def _elsewhere(*_: Any) -> tuple[Any, ...]:
    raise AssertionError("another worker's section")


class Block(nn.Module):
    """Tensors that belong together: they are gathered, recomputed and freed together."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.attributes = register(self, tensors)

    def forward(self, work: Piecework, shared: Mapping[str, Tensor], values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The section's outputs. `shared`: tensors that other blocks use too; `values`: given and inputs."""
        tensors = [shared[n] if n in shared else getattr(self, self.attributes[n]) for n in work.section.tensors]
        return work.function(*tensors, *values)


def register(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Makes `tensors` parameters and buffers of a module; returns name -> attribute."""
    attributes = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        attributes[name] = f"tensor{index}"
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(f"tensor{index}", tensor)
        else:
            module.register_buffer(f"tensor{index}", tensor)
    return attributes


class Stage(nn.Module):
    """The blocks of one stage.

    Args:
        blocks: the tensors of each block.
        shared: tensors that several of the blocks use.
        keyed: random operations, which recomputation must draw again.
        recomputed: of so many of the first blocks only what is handed to them is kept, and the rest is computed again
            in the backward pass.
        products: whether these keep the results of their products too, see `selective`.
        bf16: compute in bfloat16 where torch's autocast says so.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        keyed: KeyedOperations,
        *,
        recomputed: int,
        products: bool,
        bf16: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(tensors) for tensors in blocks)
        self.attributes = register(self, shared)
        self.keyed = keyed
        self.recomputed = recomputed
        self.contexts = selective.contexts if products else noop_context_fn
        self.bf16 = bf16

    def forward(self, work: StageWork, given: Mapping[str, Any], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The stage's outputs. `given`: the batch and constants by placeholder; `inputs`: as in `work.inputs`."""
        if not self.bf16:
            return self._forward(work, given, inputs)
        device = next(self.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            return self._forward(work, given, inputs)

    def _forward(self, work: StageWork, given: Mapping[str, Any], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        values: dict[fx.Node, Any] = dict(zip(work.inputs, inputs, strict=True))
        shared = {name: getattr(self, attribute) for name, attribute in self.attributes.items()}
        for number, (block, piece) in enumerate(zip(self.blocks, work.blocks, strict=True)):
            section = piece.section
            arguments = (*(given[node.name] for node in section.given), *(values[node] for node in section.inputs))
            again = number < self.recomputed and torch.is_grad_enabled()
            results = (self._run_again if again else _run)(block, piece, shared, arguments)
            values.update(zip(section.outputs, results, strict=True))
        return tuple(values[node] for node in work.outputs)

    def _run_again(
        self, block: nn.Module, piece: Piecework, shared: Mapping[str, Tensor], arguments: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """A block that keeps its inputs alone, and runs once more in the backward pass."""
        position = copy(self.keyed.position)
        again = False

        def compute(*values: Any) -> tuple[Any, ...]:
            nonlocal again
            with self.keyed.at(position, again=again), _kept(block, again):
                again = True
                return _run(block, piece, shared, values)

        output: tuple[Any, ...] = checkpoint(
            compute, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts
        )
        return output


def _run(
    block: nn.Module, piece: Piecework, shared: Mapping[str, Tensor], arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    result: tuple[Any, ...] = block(piece, shared, arguments)
    return result


class _kept:  # noqa: N801  a context manager
    """What buffers hold is not changed a second time when a block is computed again."""

    def __init__(self, block: nn.Module, again: bool) -> None:
        self._buffers = list(block.buffers()) if again else []

    def __enter__(self) -> None:
        self._values = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._values, strict=True):
                buffer.data.copy_(value)  # a version that autograd does not count: nothing has changed
