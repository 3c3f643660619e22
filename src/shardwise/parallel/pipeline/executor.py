"""Execute a pipeline's table of actions: compute, send and receive.

A value goes directly from the stage that makes it to each stage that uses it, and its gradient returns the same way. A
skip connection across several stages is one message, not one per stage.

Receives are posted one action ahead. A send is waited for, and its memory freed, once its receive must have been
posted: a message from a worker shows how far that worker has come in its table. Waiting any sooner could deadlock.
Waiting until the end of the pass would hold the messages of all microbatches. On a GPU a send that has completed is
freed sooner; gloo does not tell before it is waited for.

A pass may leave backward passes to the next one (`goes_on`). Its sends stay in flight, and positions count on.

What a stage has sent is not held for its backward pass, which needs only the place of the value in autograd's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.profiler import record_function

from shardwise.parallel.pipeline.channels import Channels
from shardwise.parallel.pipeline.stage import StageModule, StepWork
from shardwise.parallel.pipeline.weight_gradients import WeightGradients
from shardwise.splitting.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Action

WAIT = "shardwise::wait"
"""Profiler range around the time spent waiting for messages."""

MOST_STAGES = 256
"""Limit on the number of stages; with more, two messages could have the same tag."""


@dataclass(slots=True)
class Inflight:
    """State of a microbatch on a stage between its forward and its backward pass.

    Attributes:
        inputs: received values, as leaves that collect gradients.
        outputs: place in autograd's graph, and dtype, of each computed value that other stages use and that has a
            gradient. None on the last stage.
        loss: the scaled loss on the last stage. None on the others.
    """

    inputs: dict[fx.Node, Tensor]
    outputs: dict[fx.Node, tuple[GradientEdge, torch.dtype]] | None = None
    loss: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PipelinePass:
    """Microbatches of a step that go through the pipeline together; their shapes may differ.

    Attributes:
        works: per microbatch, by its number, the work of the stages for its shapes.
        actions: the actions of this worker.
        others: returns the actions of any worker.
        given: per microbatch, the batch and constants by placeholder.
        scales: per microbatch, the factor of its loss.
        enter: called with the number of a microbatch before its forward pass.
        before_backward: called with (action, whether it is the stage's last backward of this pass).
        goes_on: whether the next pass has backward passes of microbatches of this one.
    """

    works: Sequence[StepWork] | Mapping[int, StepWork]
    actions: Sequence[Action]
    others: Callable[[int], Sequence[Action]]
    given: Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]]
    scales: Sequence[Tensor] | Mapping[int, Tensor]
    enter: Callable[[int], None]
    before_backward: Callable[[Action, bool], None]
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """Message in flight.

    Attributes:
        worker: the worker that receives it.
        position: index of the receiving action in that worker's table, or in all of them one after the other.
        handle: the handle of the send.
        message: the sent tensor, kept alive until the send completes.
    """

    worker: int
    position: int
    handle: Any
    message: Tensor


class PipelineExecutor:
    """This worker's stages and its communication with the other pipeline workers.

    Attributes:
        stages: this worker's stages by stage index.
        worker, workers: index of this worker and number of workers; stage s is on worker s % workers.
        group: the workers of the pipeline. None: this one alone.
        device: the device that this worker computes on.
        weights: the weight gradients that split backward passes deferred.
        parts: sums of scale times each of several losses over this worker's microbatches; empty for a single loss.
        channels: groups of messages, see `channels.open_channels`; without them messages go by tag in `group`.
    """

    def __init__(
        self,
        stages: Mapping[int, StageModule],
        worker: int,
        workers: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        weights: WeightGradients,
        channels: Channels | None = None,
    ) -> None:
        self.stages = stages
        self.worker = worker
        self.workers = workers
        self.group = group
        self.device = device
        self.weights = weights
        self.parts: list[Tensor] = []
        self.channels = channels or {}
        self._inflight: dict[tuple[int, int], Inflight] = {}
        self._arriving: dict[Action, list[tuple[fx.Node, Tensor, Any]]] = {}
        self._here: dict[tuple[Action, int, fx.Node], Tensor] = {}
        self._sent: list[Sent] = []
        self._tables: Callable[[int], Sequence[Action]] = lambda _: ()
        self._positions: dict[int, dict[Action, int]] = {}
        self._passed = [0] * workers

    # ---- training ---------------------------------------------------------------------------------------------------

    def run(self, work: PipelinePass) -> Tensor:
        """Compute the gradients of a pass, left in `.grad`.

        Returns the sum of scale times loss over this worker's microbatches.

        The sum is 0 on workers without the last stage.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self._tables = work.others
        last = {action.stage: index for index, action in enumerate(work.actions) if action.kind != FORWARD}
        for index, action in enumerate(work.actions):
            self._post(work.works[action.microbatch], action)
            for ahead in work.actions[index + 1 : index + 2]:
                self._post(work.works[ahead.microbatch], ahead)
            final = last[action.stage] == index
            if action.kind == FORWARD:
                loss = self._forward(work, action)
                total = total if loss is None else total + loss
            elif action.kind == WEIGHT:
                self.weights.compute((action.stage, action.microbatch))
            else:
                work.before_backward(action, final)
                self._backward(work, action)
        if work.goes_on:
            self._pause()
        else:
            self._finish()
        return total

    def _forward(self, work: PipelinePass, action: Action) -> Tensor | None:
        stage, microbatch = action.stage, action.microbatch
        work.enter(microbatch)
        whole = work.works[microbatch]
        stage_work = whole.stages[stage]
        received = self._received(whole, action)
        inputs = {node: received[node].detach().requires_grad_(node.meta["grad"]) for node in stage_work.inputs}
        results = self.stages[stage](stage_work, work.given[microbatch], [inputs[node] for node in stage_work.inputs])
        inflight = self._inflight[stage, microbatch] = Inflight(inputs)
        if stage == len(whole.stages) - 1:
            scale = work.scales[microbatch]
            inflight.loss = (results[0] * scale).where(scale != 0, 0)  # with scale 0 the nan of an empty mean becomes 0
            parts = [(each.detach().double() * scale).where(scale != 0, 0) for each in results[1:]]
            self.parts = [a + b for a, b in zip(self.parts, parts, strict=True)] if self.parts else parts
            return inflight.loss.detach()
        outputs = dict(zip(stage_work.outputs, results, strict=True))
        inflight.outputs = {
            node: (get_gradient_edge(value), value.dtype) for node, value in outputs.items() if value.requires_grad
        }
        for target in range(stage + 1, len(whole.stages)):
            nodes = whole.messages(stage, target)
            self._send(action, target, nodes, [outputs[node] for node in nodes])
        return None

    def _backward(self, work: PipelinePass, action: Action) -> None:
        stage, microbatch = action.stage, action.microbatch
        inflight = self._inflight.pop((stage, microbatch))
        gradients = self._received(work.works[microbatch], action)
        self.weights.begin((stage, microbatch) if action.kind == INPUT else None)
        if inflight.outputs is None:
            assert inflight.loss is not None
            inflight.loss.backward()  # type: ignore[no-untyped-call]
        else:
            targets = [node for node in gradients if node in inflight.outputs]
            edges = [inflight.outputs[node][0] for node in targets]
            torch.autograd.backward(edges, [gradients[node].to(inflight.outputs[node][1]) for node in targets])
        self.weights.begin(None)
        for source in range(stage):
            nodes = [node for node in work.works[microbatch].messages(source, stage) if node.meta["grad"]]
            self._send(action, source, nodes, [_gradient(inflight.inputs[node]) for node in nodes])

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, work: StepWork, given: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
        """Run a forward pass in evaluation.

        Returns the results of the step on the worker of the last stage, None elsewhere.
        """
        results = None
        for stage in sorted(self.stages):
            action = Action(FORWARD, stage, 0)
            self._post(work, action)
            received = self._received(work, action)
            stage_work = work.stages[stage]
            outputs = self.stages[stage](stage_work, given, [received[node] for node in stage_work.inputs])
            if stage == len(work.stages) - 1:
                results = outputs
                continue
            values = dict(zip(stage_work.outputs, outputs, strict=True))
            for target in range(stage + 1, len(work.stages)):
                nodes = work.messages(stage, target)
                self._send(action, target, nodes, [values[node] for node in nodes])
        self._finish()
        return results

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _sources(self, work: StepWork, action: Action) -> list[tuple[int, list[fx.Node]]]:
        """Return the stages that an action receives from, with the values that each sends."""
        if action.kind == FORWARD:
            pairs = [(source, work.messages(source, action.stage)) for source in range(action.stage)]
        elif action.kind in (BACKWARD, INPUT):
            later = range(action.stage + 1, len(work.stages))
            pairs = [(t, [n for n in work.messages(action.stage, t) if n.meta["grad"]]) for t in later]
        else:
            pairs = []
        return [(stage, nodes) for stage, nodes in pairs if nodes]

    def _post(self, work: StepWork, action: Action) -> None:
        """Post the receives of an action, unless they are posted already."""
        if action in self._arriving:
            return
        arriving = []
        for source, nodes in self._sources(work, action):
            if self._on(source) == self.worker:
                continue
            tag, group = self._tag(action, source, action.stage), self._group(source, action.stage)
            for node in nodes:
                buffer = torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device=self.device)
                arriving.append((node, buffer, dist.irecv(buffer, self._rank(source), group, tag)))
        self._arriving[action] = arriving

    def _received(self, work: StepWork, action: Action) -> dict[fx.Node, Tensor]:
        """Wait for the messages of an action, and return its values by node.

        Gradients of one value that come from several stages are added up.
        """
        values: dict[fx.Node, Tensor] = {}
        for node, buffer, handle in self._arriving.pop(action):
            with record_function(WAIT):
                handle.wait()
            values[node] = buffer if node not in values else values[node] + buffer
        for source, nodes in self._sources(work, action):
            if self._on(source) != self.worker:
                self._forget(self._on(source), self._position(Action(action.kind, source, action.microbatch), 0))
            else:
                for node in nodes:
                    value = self._here.pop((_key(action), source, node))
                    values[node] = value if node not in values else values[node] + value
        return values

    def _send(self, action: Action, target: int, nodes: Sequence[fx.Node], tensors: Sequence[Tensor]) -> None:
        """Send values, or their gradients, from the stage of an action to another stage."""
        self._free()
        arrival = Action(action.kind, target, action.microbatch)
        for node, tensor in zip(nodes, tensors, strict=True):
            message = tensor.detach().to(node.meta["dtype"])
            if self._on(target) == self.worker:
                self._here[_key(arrival), action.stage, node] = message
                continue
            message = message.contiguous()
            tag = self._tag(action, action.stage, target)
            handle = dist.isend(message, self._rank(target), self._group(action.stage, target), tag)
            worker = self._on(target)
            self._sent.append(Sent(worker, self._position(arrival, self._later(worker)), handle, message))

    def _position(self, action: Action, otherwise: int) -> int:
        """Return the index of an action in its worker's table, after those before it.

        Returns `otherwise` if it is in another table: of the pass before, or of the next one; an evaluation has none.
        """
        worker = self._on(action.stage)
        if worker not in self._positions:
            table = enumerate(self._tables(worker), self._passed[worker])
            self._positions[worker] = {_key(each): position for position, each in table if each.kind != WEIGHT}
        return self._positions[worker].get(_key(action), otherwise)

    def _later(self, worker: int) -> int:
        """Return a position in a worker's next table that no backward pass left to it is after; 0 in an evaluation."""
        table = self._tables(worker)
        return self._passed[worker] + len(table) + 1 + 2 * self.workers if table else 0

    def _forget(self, worker: int, position: int) -> None:
        """Free the sends to a worker that must have posted their receives, because it is at `position` in its table.

        A worker posts receives one action ahead.
        """
        asked = [sent for sent in self._sent if sent.worker == worker and sent.position <= position + 1]
        if not asked:
            return
        with record_function(WAIT):
            for sent in asked:
                sent.handle.wait()
        self._sent = [sent for sent in self._sent if sent.worker != worker or sent.position > position + 1]

    def _free(self) -> None:
        """Free the sends that have completed, where the backend can tell."""
        if self.device.type == "cpu":
            return
        waiting = []
        for sent in self._sent:
            if sent.handle.is_completed():
                sent.handle.wait()  # returns at once; the backend lets go of the message
            else:
                waiting.append(sent)
        self._sent = waiting

    def _pause(self) -> None:
        """End a pass that the next one goes on from.

        Positions skip one between two tables: the last action of a table posts no receive of the next table.
        """
        for worker in range(self.workers):
            self._passed[worker] += len(self._tables(worker)) + 1
        self._positions.clear()

    def _finish(self) -> None:
        with record_function(WAIT):
            for sent in self._sent:
                sent.handle.wait()
        self._sent.clear()
        self._positions.clear()
        self._passed = [0] * self.workers
        self._tables = lambda _: ()

    def _on(self, stage: int) -> int:
        return stage % self.workers

    def _rank(self, stage: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, self._on(stage))

    def _group(self, source: int, target: int) -> dist.ProcessGroup | None:
        return self.channels[source, target] if self.channels else self.group

    def _tag(self, action: Action, source: int, target: int) -> int:
        """Compute the tag of a group of messages, equal on both sides. Messages with equal tags arrive in order."""
        direction = 0 if action.kind == FORWARD else 1
        return ((action.microbatch * 2 + direction) * MOST_STAGES + source) * MOST_STAGES + target


def goes_back(tag: int) -> bool:
    """Return whether the message with this tag is a gradient; see `PipelineExecutor._tag`."""
    return bool(tag // MOST_STAGES**2 % 2)


def channel_of(tag: int) -> tuple[int, int]:
    """Return the (stage that sends, stage that receives) of the messages with this tag."""
    return tag // MOST_STAGES % MOST_STAGES, tag % MOST_STAGES


def _key(action: Action) -> Action:
    """Return the action with any kind of backward pass replaced by BACKWARD."""
    return action if action.kind == FORWARD else Action(BACKWARD, action.stage, action.microbatch)


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad
