"""One optimizer step of a transformer on a cluster: from kernels and collectives to a prediction.

    step      = pipeline + exposed gradient reduction + optimizer
    pipeline  = m (F + B of the slowest stage) + (F + B of the other stages) / v + messages   (1F1B, interleaved by v)
    F, B      = sum over blocks and ends of max(kernels + exposed collectives, host)               per microbatch

Ranks are laid out as Megatron does: tensor parallel ones are neighbours, then context, data, pipeline parallel ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective, Group
from shardwise.predict.hardware.constants import Constants, constants
from shardwise.predict.hardware.gpu import LARGEST_SHARE, UNLIMITED, kernel_seconds, rate, sustained
from shardwise.predict.hardware.network import collective_seconds
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.published.predictor import embedding_head
from shardwise.predict.published.predictor.block import Passes, block, tokens
from shardwise.predict.published.predictor.memory import memory
from shardwise.predict.published.predictor.sizes import Setup, Sizes
from shardwise.predict.published.predictor.stages import layers_of_stages, parameters_of_stages

TENSOR_HIDDEN = 0.5
"""Share of the collectives of tensor parallelism that products hide which are cut for it."""

TENSORS = 7
"""Parameters of a block that are gathered one by one where nothing buckets them: four or five matrices, two norms."""


@dataclass(slots=True)
class ClusterTimes:
    """Seconds of kernels and collectives on one cluster; equal ones are computed once.

    Attributes:
        cluster: its links are used.
        device: that kernels run on.
        numbers: constants of the models.
        kernels: seconds of those that were asked for.
        pace: of products, relative to what a device keeps up that never waits.
    """

    cluster: Cluster
    device: Device
    numbers: Constants
    kernels: dict[Kernel, float] = field(default_factory=dict)
    pace: float = 1.0

    def of(self, kernels: Iterable[Kernel]) -> float:
        """Return the seconds of all of them, one after the other."""
        products = others = 0.0
        for kernel in kernels:
            seconds = self.kernels.get(kernel)
            if seconds is None:
                seconds = self.kernels[kernel] = kernel_seconds(kernel, self.device, self.numbers)
            if kernel.kind == "memory":
                others += seconds
            else:
                products += seconds
        return products * self.pace + others

    def collective(self, operation: str, amount: float, group: Group, axis: str) -> float:
        """Return the seconds of one collective of `amount` bytes."""
        if group.size <= 1:
            return 0.0
        return collective_seconds(Collective(operation, int(amount), group, axis), self.cluster, self.numbers)


@dataclass(frozen=True, slots=True)
class Groups:
    """Who communicates with whom, as rank 0 sees it."""

    tensor: Group
    context: Group
    replicas: Group
    stages: Group

    @staticmethod
    def of(setup: Setup) -> Groups:
        """Megatron's order of ranks."""
        tp, cp, dp = setup.tensor, setup.context, setup.data
        return Groups(Group(tp), Group(cp, tp), Group(dp * cp, tp), Group(2 if setup.pipeline > 1 else 1, tp * cp * dp))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Seconds of one pass over one microbatch of a stage.

    Attributes:
        kernels: that run.
        exposed: communication that nothing hides.
        communication: all of it.
        waiting: of the device for its host.
    """

    kernels: float
    exposed: float
    communication: float
    waiting: float

    @property
    def seconds(self) -> float:
        """Return the seconds of the device."""
        return self.kernels + self.exposed + self.waiting


def predict(
    sizes: Sizes, setup: Setup, cluster: Cluster, numbers: Constants | None = None, clock: ClusterTimes | None = None
) -> Prediction:
    """Predicts one optimizer step.

    Args:
        sizes: of the model.
        setup: how it is split.
        cluster: must have `setup.devices` devices.
        numbers: constants; those that were fitted if left out.
        clock: to share the times of equal kernels between predictions on the same kind of device.
    """
    numbers = numbers or constants()
    clock = clock or ClusterTimes(cluster, cluster.device(0), numbers)
    clock.cluster, clock.pace = cluster, 1.0
    step = _PublishedStep(sizes, setup, clock, Groups.of(setup), block(sizes, setup))
    busy = step.prediction()
    clock.pace = paced(busy.compute_seconds / busy.step_seconds, clock.device, setup.linear_dtype, numbers)
    return step.prediction()


def paced(busy: float, device: Device, dtype: str, numbers: Constants) -> float:
    """Time of products of a GPU that computes for a share `busy` of a step over their time if it always did.

    A limit of power bounds an average: while a GPU waits it draws little, and its clock falls less when it computes.
    """
    if dtype in UNLIMITED:
        return 1.0
    fastest = sustained(device, dtype, numbers) / LARGEST_SHARE
    return max(fastest, float(busy**numbers.idle_boost))


@dataclass(slots=True)
class _PublishedStep:
    sizes: Sizes
    setup: Setup
    clock: ClusterTimes
    groups: Groups
    passes: Passes

    def prediction(self) -> Prediction:
        sizes, setup = self.sizes, self.setup
        stages = self.stages()
        totals = [forward.seconds + backward.seconds for forward, backward in stages]
        slowest = max(range(len(totals)), key=totals.__getitem__)
        forward, backward = stages[slowest]
        m = setup.microbatches
        bubble = (sum(totals) - totals[slowest]) / setup.chunks
        messages, tied = self.messages(), self.tied_embedding()
        reduction, reduction_exposed, gathering = self.gradients(totals[slowest])
        update = self.update()
        kernels = m * (forward.kernels + backward.kernels)
        exposed_inside = m * (forward.exposed + backward.exposed)
        host = m * (forward.waiting + backward.waiting)
        exposed = exposed_inside + messages + tied + reduction_exposed + gathering
        samples = setup.micro_batch * m * setup.data
        device = self.clock.device
        flops = 3 * sizes.forward_flops(samples)
        return Prediction(
            step_seconds=kernels + exposed + bubble + update + host,
            compute_seconds=kernels,
            communication_seconds=m * (forward.communication + backward.communication)
            + messages
            + tied
            + reduction
            + gathering,
            exposed_communication_seconds=exposed,
            bubble_seconds=bubble,
            optimizer_seconds=update,
            host_seconds=host,
            memory=memory(sizes, setup),
            memory_available=device.memory_bytes,
            model_flops=flops,
            peak_flops=rate(device, setup.linear_dtype) * setup.devices,
            samples=samples,
            terms={
                "tensor parallel": exposed_inside,
                "pipeline messages": messages,
                "tied embedding": tied,
                "gradients": reduction_exposed,
                "parameters": gathering,
            },
            origins={"constants": "fitted"},
        )

    # ------------------------------------------------------------------ stages

    def stages(self) -> list[tuple[PassTimes, PassTimes]]:
        """Forward and backward pass of every stage for one microbatch."""
        layer_forward, layer_backward = self.layer_forward(), self.layer_backward()
        embedding, head = embedding_head.embedding(self.sizes, self.setup), embedding_head.head(self.sizes, self.setup)
        layers = layers_of_stages(self.sizes, self.setup)
        result = []
        for stage, count in enumerate(layers):
            first, last = stage == 0, stage == len(layers) - 1
            neighbours = 2 - first - last
            parts = []
            for index, layer in enumerate((layer_forward, layer_backward)):
                extra = (embedding[index] if first else ()) + (head[index] if last else ())
                beside = self.clock.of(extra)
                shared = self.tensor_head(index) if last else 0.0
                host = self.host(len(extra)) + neighbours * self.clock.numbers.host_message
                parts.append(
                    PassTimes(
                        kernels=count * layer.kernels + beside,
                        exposed=count * layer.exposed + shared,
                        communication=count * layer.communication + shared,
                        waiting=count * layer.waiting + max(0.0, host - beside - shared),
                    )
                )
            result.append((parts[0], parts[1]))
        return result

    def tensor_head(self, index: int) -> float:
        """Reductions of the vocabulary-parallel loss (three of one float per token), or of its inputs' gradient."""
        if self.setup.tensor == 1:
            return 0.0
        t = tokens(self.sizes, self.setup)
        if index == 0:
            return 3 * self.clock.collective("all_reduce", 4 * t, self.groups.tensor, "tp")
        return self.clock.collective("all_reduce", 2 * t * self.sizes.hidden, self.groups.tensor, "tp")

    def host(self, kernels: float, collectives: float = 0.0) -> float:
        """Seconds that the host needs to start so many."""
        numbers = self.clock.numbers
        if self.setup.stack.graphs:
            return 0.0
        return kernels * numbers.host_kernel + collectives * numbers.host_collective

    # ------------------------------------------------------------------ one block

    def layer_forward(self) -> PassTimes:
        kernels = self.passes.forward
        return self._part(self.clock.of(kernels), len(kernels), 2, backward=False)

    def layer_backward(self) -> PassTimes:
        stack, repeated = self.setup.stack, self.passes.recomputed
        share = 0.5 if self.setup.recompute == "layers" else 1.0
        kernels = self.clock.of(self.passes.backward) + share * self.clock.of(repeated)
        started = share * len(repeated) + len(self.passes.backward)
        whole = self.setup.recompute in ("full", "layers")
        reductions = share * (1 if stack.stops_early else 2) if whole else 0.0
        return self._part(kernels, started, 2 + reductions, backward=True)

    def _part(self, kernels: float, started: float, reductions: float, *, backward: bool) -> PassTimes:
        """`kernels`: their seconds; `started`: how many there are."""
        exposed, total, calls = self.tensor_parallel(reductions, backward=backward)
        ring = self.context_parallel(backward=backward)
        sharded, sharded_exposed = self.fully_sharded(kernels + exposed, backward=backward)
        return PassTimes(
            kernels=kernels,
            exposed=exposed + ring + sharded_exposed,
            communication=total + ring + sharded,
            waiting=max(0.0, self.host(started, calls) - kernels - exposed - ring - sharded_exposed),
        )

    def tensor_parallel(self, reductions: float, *, backward: bool) -> tuple[float, float, float]:
        """Exposed and all seconds of a block's tensor parallelism, and the number of collectives."""
        setup, group = self.setup, self.groups.tensor
        if setup.tensor == 1:
            return 0.0, 0.0, 0.0
        amount = tokens(self.sizes, setup) * self.sizes.hidden * 2
        if setup.dtype in ("float32", "tf32"):
            amount *= 2
        hidden = TENSOR_HIDDEN if setup.stack.overlap_tensor else 0.0
        later = 2 if backward and setup.stack.async_tensor else 0  # while gradients of weights are computed
        if setup.sequence_parallel:
            gather = self.clock.collective("all_gather", amount, group, "tp")
            scatter = self.clock.collective("reduce_scatter", amount, group, "tp")
            total = reductions * (gather + scatter) + (2 * gather if backward else 0.0)
            visible = reductions * (gather + scatter) - later * scatter
            return (1 - hidden) * visible + self.beside(later * scatter), total, 2 * reductions
        each = self.clock.collective("all_reduce", amount, group, "tp")
        visible = (reductions - later) * each
        return (1 - hidden) * visible + self.beside(later * each), reductions * each, reductions

    def beside(self, seconds: float) -> float:
        """Return the seconds by which communication that is hidden slows computation."""
        return self.clock.numbers.overlap_loss * seconds

    def context_parallel(self, *, backward: bool) -> float:
        """Keys and values go around the ring while attention runs; what is left of them is counted as exposed."""
        setup = self.setup
        if setup.context == 1:
            return 0.0
        heads = max(1, self.sizes.kv_heads // setup.tensor)
        amount = 2 * setup.micro_batch * self.sizes.sequence * heads * self.sizes.head_size * 2
        seconds = self.clock.collective("all_gather", amount, self.groups.context, "cp") * (2 if backward else 1)
        return 0.3 * seconds

    def fully_sharded(self, hidden_behind: float, *, backward: bool) -> tuple[float, float]:
        """All and exposed seconds of gathering a block's parameters and scattering its gradients (zero 3)."""
        setup = self.setup
        if setup.zero < 3 or setup.shards == 1:
            return 0.0, 0.0
        group = Group(setup.shards, setup.tensor)
        parameters = self.sizes.layer_parameters / setup.tensor
        seconds = self.clock.collective("all_gather", 2 * parameters, group, "fsdp")
        if backward:
            amount = setup.stack.gradient_bytes * parameters
            seconds += self.clock.collective("reduce_scatter", amount, group, "fsdp")
        return seconds, self.visible(seconds, hidden_behind)

    def visible(self, seconds: float, behind: float) -> float:
        """Return the exposed seconds of communication that runs beside `behind` seconds of computation."""
        return max(0.0, seconds - behind) + self.clock.numbers.overlap_loss * min(seconds, behind)

    # ------------------------------------------------------------------ between stages, gradients, update

    def messages(self) -> float:
        """Exposed messages between stages: every microbatch sends one forward and one backward."""
        setup = self.setup
        if setup.pipeline == 1:
            return 0.0
        amount = 2.0 * tokens(self.sizes, setup) * self.sizes.hidden
        if setup.sequence_parallel or setup.stack.scatter_pipeline:
            amount /= setup.tensor
        seconds = self.clock.collective("send", amount, self.groups.stages, "pp")
        count = 2 * (setup.microbatches * setup.chunks + setup.pipeline - 1)
        if setup.stack.overlap_pipeline:
            count = 2 * (setup.pipeline - 1)
        return count * seconds

    def tied_embedding(self) -> float:
        """First and last stage sum the gradients of the embedding that they share."""
        setup = self.setup
        if setup.pipeline == 1 or not self.sizes.tied:
            return 0.0
        rows = setup.columns(self.sizes.vocab) * self.sizes.hidden
        ends = Group(2, (setup.pipeline - 1) * setup.devices // setup.pipeline)
        return self.clock.collective("all_reduce", rows * setup.stack.gradient_bytes, ends, "pp")

    def parameters(self) -> float:
        """Parameters of the rank that holds and reduces most."""
        return max(parameters_of_stages(self.sizes, self.setup))

    def gradients(self, work: float) -> tuple[float, float, float]:
        """All and exposed seconds of reducing gradients, and of gathering ZeRO-1's parameters."""
        setup, clock, group = self.setup, self.clock, self.groups.replicas
        if setup.replicas == 1 or setup.zero >= 3:
            return 0.0, 0.0, 0.0
        amount = self.parameters() * setup.stack.gradient_bytes
        sharded = setup.zero > 0 and setup.stack.sharded_reduction
        operation = "reduce_scatter" if sharded else "all_reduce"
        total = clock.collective(operation, amount, group, "dp")
        exposed = total
        if setup.stack.overlap_gradients:
            exposed = self.visible(total, 0.6 * work)
        gathering = 0.0
        if setup.zero:
            calls = 1 if setup.stack.bucketed else TENSORS * max(layers_of_stages(self.sizes, self.setup))
            gathering = calls * clock.collective("all_gather", self.parameters() * 2 / calls, group, "dp")
            if setup.stack.overlap_parameters:
                gathering = self.visible(gathering, 0.3 * work)
        return total, exposed, gathering

    def update(self) -> float:
        setup = self.setup
        owned = self.parameters() if setup.pipeline > 1 else self.sizes.parameters / setup.tensor
        if setup.zero:
            owned /= setup.shards if setup.zero >= 3 else setup.replicas
        return self.clock.of([embedding_head.update(owned, setup)])


def explained(prediction: Prediction) -> Mapping[str, float]:
    """The terms of a step that add up to it, by name."""
    return {
        "compute": prediction.compute_seconds,
        **prediction.terms,
        "bubble": prediction.bubble_seconds,
        "optimizer": prediction.optimizer_seconds,
        "host": prediction.host_seconds,
    }
