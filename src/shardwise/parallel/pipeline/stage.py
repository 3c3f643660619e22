"""The part of one pipeline stage that a worker holds, as modules, and its computation for each shape of the step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from shardwise.parallel.compiling.regions import GraphRegion, pieces
from shardwise.parallel.operators import selective_checkpoint
from shardwise.parallel.operators.graph_operators import GraphOperators, Noted
from shardwise.parallel.pipeline.cut_points import Use, positions
from shardwise.parallel.pipeline.subgraphs import Section, compiled, sections
from shardwise.parallel.tensor.partitioner import LocalGraph
from shardwise.splitting.balance import recomputed_blocks
from shardwise.strategy import Strategy
from shardwise.workload.precision import Copies
from shardwise.workload.trace.graph import StepGraph


@dataclass(frozen=True, slots=True)
class BlockWork:
    """Compiled section: the computation of a block for one shape of the step.

    Attributes:
        section: the section.
        function: its computation.
        wide: dtype of each parameter that it uses as it is stored, by name: it may have been gathered in another.
    """

    section: Section
    function: Callable[..., tuple[Any, ...]]
    wide: Mapping[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class StageWork:
    """Computation of a stage for one shape of the step.

    Attributes:
        blocks: the computations of its blocks, in order.
        inputs: values from other stages.
        outputs: values for other stages, or the results of the step.
    """

    blocks: tuple[BlockWork, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class StepWork:
    """Computation of all stages for one shape of the step.

    Attributes:
        local: the worker's graph of the step.
        stages: by stage index; only the worker's own have compiled functions.
        home: value that one stage sends to another -> index of the stage that makes it.
    """

    local: LocalGraph
    stages: tuple[StageWork, ...]
    home: Mapping[fx.Node, int] = field(repr=False)

    def messages(self, source: int, target: int) -> list[fx.Node]:
        """Return the values that stage `source` makes and stage `target` uses."""
        return [node for node in self.stages[target].inputs if self.home[node] == source]


def prepare(
    local: LocalGraph,
    cut: Sequence[Use],
    stage_blocks: Sequence[int],
    parameters: Collection[str],
    own: Collection[int],
    strategy: Strategy,
) -> StepWork:
    """Cut a step into blocks at `cut`. The first `stage_blocks[0]` of them make the first stage, and so on.

    Only the stages in `own` become functions; those of a training step in which `strategy` says so are compiled.
    """
    parts = sections(local, positions(local, cut, parameters))
    stages: list[StageWork] = []
    home: dict[fx.Node, int] = {}
    first = 0
    for stage, count in enumerate(stage_blocks):
        mine = parts[first : first + count]
        for section in mine:
            home.update({node: stage for node in section.outputs if node not in home})
        stages.append(
            _stage_work(
                mine,
                parts[first + count :],
                local,
                _regions_of(strategy, local, stage, count) if stage in own else None,
            )
        )
        first += count
    return StepWork(local, tuple(stages), home)


Regions = Callable[[Section, int], Sequence[GraphRegion | fx.Node]]
"""Function that cuts the calls of a section, given with its number in the stage, into regions and single calls."""


def _regions_of(strategy: Strategy, local: LocalGraph, stage: int, blocks: int) -> Regions:
    """Return how the sections of a stage are cut into compiled regions."""
    compiled = strategy.compiled if local.step.training else ""
    last = stage == strategy.pp * strategy.stages_per_worker - 1
    again = recomputed_blocks(strategy, blocks, last=last)
    return lambda section, number: pieces(section.nodes, section.outputs, compiled, again=number < again)


def _stage_work(mine: list[Section], later: list[Section], local: LocalGraph, regions: Regions | None) -> StageWork:
    made = {node for section in mine for node in set(section.outputs).intersection(section.nodes)}
    inputs = [node for section in mine for node in section.inputs if node not in made]
    wanted = {node for section in later for node in section.inputs}
    outputs = [node for section in mine for node in section.outputs if node in wanted] if later else mine[-1].outputs
    wide = _wide(local.step)
    blocks = tuple(
        BlockWork(section, _elsewhere if regions is None else compiled(section, local, regions(section, number)), wide)
        for number, section in enumerate(mine)
    )
    return StageWork(blocks, tuple(dict.fromkeys(inputs)), tuple(dict.fromkeys(outputs)) if later else tuple(outputs))


def _wide(step: StepGraph) -> dict[str, torch.dtype]:
    """Map the tensors that a step is given as they are stored to their dtypes; empty if it is given all so."""
    if not step.narrow:
        return {}
    own = (node for node in step.graph.nodes if node.op == "placeholder" and node.name in step.tensors)
    return {step.tensors[node.name]: node.meta["val"].dtype for node in own if not step.is_narrow(node)}


def _elsewhere(*_: Any) -> tuple[Any, ...]:
    raise AssertionError("another worker's section")


class BlockModule(nn.Module):
    """Tensors that belong together: they are gathered, recomputed and freed as a unit.

    Args:
        tensors: the tensors by name.
        copies: copies in bfloat16, of the step that runs.
    """

    def __init__(self, tensors: Mapping[str, Tensor], copies: Copies) -> None:
        super().__init__()
        self.attributes = register(self, tensors)
        self.copies = copies

    def forward(self, work: BlockWork, shared: Mapping[str, Tensor], values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Compute the section's outputs.

        `shared` has the tensors that other blocks use too, `values` the given and input values.
        """
        tensors = []
        for name in work.section.tensors:
            tensor = shared[name] if name in shared else getattr(self, self.attributes[name])
            tensors.append(tensor.to(work.wide[name]) if name in work.wide else tensor)
        return work.function(self.copies.of, *tensors, *values)


def register(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Register `tensors` as parameters and buffers of a module. Returns name -> attribute."""
    attributes = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        attributes[name] = f"tensor{index}"
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(f"tensor{index}", tensor)
        else:
            module.register_buffer(f"tensor{index}", tensor)
    return attributes


class StageModule(nn.Module):
    """Module of one pipeline stage: its blocks, and the tensors that several of them use.

    Args:
        blocks: the tensors of each block.
        shared: tensors that several of the blocks use.
        operators: random operations, whose numbers recomputation must draw again.
        recomputed: number of blocks, from the first, that save only their inputs and are recomputed in the backward
            pass.
        products: whether these blocks save the results of their products too, see `selective_checkpoint`.
        copies: copies of parameters in bfloat16, of the step that runs.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Tensor]],
        shared: Mapping[str, Tensor],
        operators: GraphOperators,
        *,
        recomputed: int,
        products: bool,
        copies: Copies,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BlockModule(tensors, copies) for tensors in blocks)
        self.attributes = register(self, shared)
        self.operators = operators
        self.recomputed = recomputed
        self.contexts = selective_checkpoint.contexts if products else noop_context_fn

    def forward(self, work: StageWork, given: Mapping[str, Any], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Compute the stage's outputs.

        `given` has the batch and constants by placeholder, `inputs` the values of `work.inputs`.
        """
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
        self, block: nn.Module, piece: BlockWork, shared: Mapping[str, Tensor], arguments: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Run a block that saves only its inputs and is recomputed in the backward pass."""
        position = copy(self.operators.position)
        again = False
        noted: list[Noted] = []

        def compute(*values: Any) -> tuple[Any, ...]:
            nonlocal again
            with self.operators.at(position, noted, again=again), _restored_buffers(block, again):
                again = True
                return _run(block, piece, shared, values)

        output: tuple[Any, ...] = checkpoint(
            compute, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts
        )
        return output


def _run(
    block: nn.Module, piece: BlockWork, shared: Mapping[str, Tensor], arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    result: tuple[Any, ...] = block(piece, shared, arguments)
    return result


class _restored_buffers:  # noqa: N801  a context manager
    """Context manager that restores the buffers of a block after its recomputation, so that they change only once."""

    def __init__(self, block: nn.Module, again: bool) -> None:
        self._buffers = list(block.buffers()) if again else []

    def __enter__(self) -> None:
        self._values = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._values, strict=True):
                buffer.data.copy_(value)  # `.data` does not bump the version for autograd: nothing has changed
