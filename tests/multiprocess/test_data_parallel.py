"""dp, fsdp and their product give what one process gives: losses, gradients, parameters, buffers, optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from equality import Result, assert_equal, errors, reference, train
from pool import Pools
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.program import Program
from shardwise.strategy import Strategy
from shardwise.workload.workload import Evaluation, Workload

DOUBLE = 1e-10
TWO = ("dp=2", "fsdp=2,zero=1", "fsdp=2,zero=2", "fsdp=2")
FOUR = ("dp=4", "fsdp=4,zero=1", "fsdp=4,zero=2", "fsdp=4", "dp=2,fsdp=2", "dp=2,fsdp=2,zero=1")


def points(samples: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 6, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def classify(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.float() if output.dtype == torch.bfloat16 else output, batch[1])


def accuracy(output: Tensor, batch: Any) -> Tensor:
    result: Tensor = (output.argmax(-1) == batch[1]).double().mean()
    return result


def make(model: Callable[[], nn.Module], **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "points",
        "model": lambda: model().double(),
        "dataset": points(13),
        "inputs": lambda batch: batch[0],
        "loss": classify,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        "batch_size": 8,
        "evaluation": Evaluation(dataset=points(11), metric="accuracy", measure=accuracy),
        "seed": 3,
    }
    return Workload(**{**options, **changes})


class Block(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 7)
        self.down = nn.Linear(7, size)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * F.dropout(self.down(torch.tanh(self.up(x))), 0.2, self.training)


def mlp(**changes: Any) -> Workload:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), Block(5), Block(5), nn.Linear(5, 3))

    return make(build, **changes)


def convolution() -> Workload:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 6)),
            nn.Conv1d(1, 4, 3),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Dropout1d(0.2),
            nn.Flatten(),
            nn.BatchNorm1d(16, momentum=None),
            nn.Linear(16, 3),
        )

    # Adam would make steps of what is zero but for rounding: the bias before a normalisation
    return make(build, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True)
        self.enter = nn.Linear(1, 8)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(self.enter(x.unsqueeze(-1)))
        return {"logits": self.leave(hidden.mean(1)), "hidden": hidden}


def transformer(**changes: Any) -> Workload:
    options: dict[str, Any] = {
        "loss": lambda output, batch: classify(output["logits"], batch),
        "evaluation": Evaluation(
            dataset=points(11), metric="accuracy", measure=lambda output, batch: accuracy(output["logits"], batch)
        ),
    }
    return make(Transformer, **{**options, **changes})


class Tied(nn.Module):
    """A language model with tied embeddings, frozen parameters and a parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        blocks = [Block(5) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(5, 9)
        self.head.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.tensor(1.3))
        blocks[1].up.weight.requires_grad_(False)
        self.never = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = self.head(hidden) * self.temperature
        return output


def sentences(samples: int) -> TensorDataset:
    """Tokens, of which a different number counts in each sentence: none at all in every third one."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 9, (samples, 6), generator=generator)
    length = torch.arange(samples) % 3 * 3
    return TensorDataset(tokens, torch.arange(6) < length[:, None])


def masked_mean(output: Tensor, batch: Any) -> Tensor:
    tokens, counts = batch
    each = F.cross_entropy(output.transpose(1, 2), tokens, reduction="none")
    result: Tensor = (each * counts).sum() / counts.sum()
    return result


def language() -> Workload:
    return make(
        Tied,
        dataset=sentences(13),
        loss=masked_mean,
        weight=lambda batch: batch[1].sum(),
        evaluation=Evaluation(
            dataset=sentences(10),
            metric="right",
            measure=lambda output, batch: (output.argmax(-1) == batch[0]).double().mean(),
        ),
        clip_norm=0.1,
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )


class Experts(nn.Module):
    """Each sample goes through one expert: some replicas leave experts out, in some steps all do."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        choice = (x[:, 0].abs() * 6).long() % 6
        output = x.new_zeros(len(x), 3)
        for number in choice.unique().tolist():  # type: ignore[no-untyped-call]
            picked = choice == number
            output[picked] = self.experts[number](x[picked])
        return output


def experts(**changes: Any) -> Workload:
    return make(lambda: nn.Sequential(nn.Linear(6, 6), Experts()), batch_size=4, **changes)


WORKLOADS = {
    "mlp": mlp,
    "convolution": convolution,
    "transformer": transformer,
    "language": language,
    "experts": experts,
}


def check(
    workers: Pools, factory: Callable[[], Workload], strategy: str, tolerance: float = DOUBLE, steps: int = 3
) -> Result:
    result = train(workers, factory, strategy, steps, evaluate=True)
    assert_equal(result, reference(workers, factory, strategy, steps, evaluate=True), tolerance)
    return result


@pytest.mark.parametrize("strategy", [*TWO, *FOUR])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_equal_to_one_process(workers: Pools, workload: str, strategy: str) -> None:
    # 13 samples in batches of 8: the second step has fewer samples than replicas share evenly
    check(workers, WORKLOADS[workload], strategy)


@pytest.mark.parametrize("strategy", [*TWO, "dp=2,fsdp=2"])
def test_accumulation_over_microbatches(workers: Pools, strategy: str) -> None:
    for factory in (mlp, convolution, language, experts):
        check(workers, factory, f"{strategy},microbatches={1 if factory is experts and 'dp=2,fsdp' in strategy else 2}")


@pytest.mark.parametrize("recompute", ["full", "1/2", "selective"])
@pytest.mark.parametrize("strategy", ["single", "dp=2", "fsdp=2,zero=2", "fsdp=2"])
def test_recomputation(workers: Pools, strategy: str, recompute: str) -> None:
    for factory in (mlp, transformer, language, recomputed_normalisation):
        result = train(workers, factory, f"{strategy},recompute={recompute}", evaluate=True)
        assert_equal(result, reference(workers, factory, strategy, evaluate=True), DOUBLE)


@pytest.mark.parametrize("strategy", ["fsdp=2", "fsdp=2,zero=2,microbatches=2", "dp=2,fsdp=2,recompute=full"])
def test_offloaded(workers: Pools, strategy: str) -> None:
    for factory in (mlp, convolution, language, experts):
        check(workers, factory, f"{strategy},offload=1")


def policies(strategy: str) -> tuple[set[str], set[str]]:
    """Return what torch does with slices on one worker, and where they are."""
    from shardwise.parallel.data.fsdp import parameter_groups

    program = Program.build(mlp(), Strategy.parse(strategy))
    engine: Any = program.engine
    found = {type(group.offload_policy).__name__ for group in parameter_groups(engine.model)}
    return found, {part.sharded_param.device.type for g in parameter_groups(engine.model) for part in g.fsdp_params}


def test_torch_is_told_to_offload(workers: Pools) -> None:
    """On a CPU it makes no difference, so that results alone would not show it."""
    assert workers(2, policies, "fsdp=2,offload=1") == [({"CPUOffloadPolicy"}, {"cpu"})] * 2
    assert workers(2, policies, "fsdp=2") == [({"OffloadPolicy"}, {"cpu"})] * 2


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.norm(self.linear(x)), 0.2, self.training)


def recomputed_normalisation() -> Workload:
    return make(lambda: nn.Sequential(Normalised(), Normalised(), nn.Linear(6, 3)))


def single_precision() -> Workload:
    return replace(
        transformer(dataset=points(13, torch.float32), evaluation=None),
        model=Transformer,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        clip_norm=1.0,
    )


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=4", "dp=2,fsdp=2"])
def test_single_and_half_precision(workers: Pools, strategy: str) -> None:
    result = train(workers, single_precision, strategy)
    assert_equal(result, reference(workers, single_precision, strategy), 1e-6, gradient_tolerance=5e-6)
    half = train(workers, single_precision, f"{strategy},precision=bf16")
    assert_equal(half, reference(workers, single_precision, f"{strategy},precision=bf16"), 0.05)
    assert {tensor.dtype for tensor in half.state.values()} == {torch.float32}


def test_last_batch_smaller_than_the_replicas(workers: Pools) -> None:
    def factory() -> Workload:
        return replace(convolution(), dataset=points(10), batch_size=8)

    for strategy in FOUR:
        check(workers, factory, strategy, steps=4)


def modules_of(program: Program) -> ModuleEngine:
    assert isinstance(program.engine, ModuleEngine)
    return program.engine


def skip_all_reduce(program: Program) -> None:
    def do_nothing(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    replicas = modules_of(program).model_of_replicas
    assert isinstance(replicas, DistributedDataParallel)
    replicas.register_comm_hook(None, do_nothing)


def scale_wrongly(program: Program) -> None:
    scales = program._scales
    program._scales = lambda share, samples=None: [scale * 1.01 for scale in scales(share, samples)]  # type: ignore[method-assign]


def normalise_alone(program: Program) -> None:
    modules_of(program)._operations._make_group = None


def drop_by_worker(program: Program) -> None:
    engine = modules_of(program)
    enter = engine._enter

    def shifted(microbatch: Any) -> Any:
        data = enter(microbatch)
        engine.position.first = 0
        return data

    engine._enter = shifted  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("factory", "broken"),
    [(mlp, skip_all_reduce), (mlp, scale_wrongly), (convolution, normalise_alone), (mlp, drop_by_worker)],
)
def test_comparison_notices(workers: Pools, factory: Callable[[], Workload], broken: Callable[[Program], None]) -> None:
    expected = reference(workers, factory, "dp=2")
    try:
        result = train(workers, factory, "dp=2", before=broken)
    except AssertionError:
        return  # the replicas no longer agree
    found = errors(result, expected)
    assert found["gradient"][0] > 1e-3, found


def test_step_takes_a_global_batch(workers: Pools) -> None:
    def steps(strategy: str) -> list[float]:
        workload = mlp()
        program = Program.build(workload, Strategy.parse(strategy))
        batch = workload.dataset.tensors[0][:8], workload.dataset.tensors[1][:8]
        return [float(program.step(batch)) for _ in range(3)]

    single = steps("single")
    for losses in workers(2, steps, "dp=2"):
        assert losses == pytest.approx(single, rel=1e-12)


class Noisy(nn.Module):
    """Weights that follow no seed, a buffer that follows the samples, a module that is never in training."""

    seen: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(
            torch.seed() % 2**31 + (dist.get_rank() if dist.is_initialized() else 0)
        )
        self.linear = nn.Linear(6, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(3, 6, generator=generator))
        self.frozen = nn.BatchNorm1d(3).eval()
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen * 0.9 + x.detach().mean(0)
            self.calls += 1
        output: Tensor = self.frozen(self.linear(x)) + torch.randperm(3) / 3
        return output


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2"])
def test_replicas_start_and_stay_equal(workers: Pools, strategy: str) -> None:
    def factory() -> Workload:
        return make(Noisy)

    # `train` fails where replicas differ
    result = train(workers, factory, strategy, evaluate=False)
    assert result.state["calls"] == 3
    assert result.state["seen"].abs().sum() > 0
    assert result.state["frozen.num_batches_tracked"] == 0
    assert any("buffer seen" in note for note in result.notes)
    assert any("random numbers" in note for note in result.notes)


@dataclass
class Hidden:
    x: Tensor
    name: str = ""


class Passing(nn.Module):
    """Takes and returns a dataclass; changes its input in place, or leaves a view for its caller to change."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.in_place = in_place

    def forward(self, hidden: Hidden) -> Hidden:
        if self.in_place:
            hidden.x += 1
        return Hidden(self.out(torch.tanh(self.linear(hidden.x))).view(-1, 6))


class Dataclasses(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Passing(in_place) for _ in range(3))

    def forward(self, x: Tensor) -> Hidden:
        hidden = Hidden(x * 1.0)
        for block in self.blocks:
            before = hidden.x
            hidden = block(hidden)
            hidden.x += before
        return hidden


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "fsdp=2,recompute=full"])
def test_dataclasses_and_work_in_place_between_blocks(workers: Pools, strategy: str) -> None:
    for in_place in (True, False):

        def factory(in_place: bool = in_place) -> Workload:
            return make(
                lambda: Dataclasses(in_place),
                loss=lambda output, batch: classify(output.x[:, :3], batch),
                evaluation=None,
            )

        result = train(workers, factory, strategy)
        assert_equal(result, train(workers, factory, "single"), DOUBLE)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4).double(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(x).float())
        return output


def test_refusals(workers: Pools) -> None:
    def build(factory: Callable[[], Workload], strategy: str) -> None:
        Program.build(factory(), Strategy.parse(strategy))

    def frozen() -> Workload:
        return make(lambda: nn.Linear(6, 3).requires_grad_(False))

    def lazy() -> Workload:
        return make(lambda: nn.LazyLinear(3))

    def other() -> Workload:
        return make(lambda: nn.Linear(6, 3 + dist.get_rank()))

    def mixed() -> Workload:
        return replace(mlp(), model=Mixed)

    for factory, strategy, message in (
        (frozen, "dp=2", "no parameter to train"),
        (lazy, "dp=2", "has no shape yet"),
        (other, "dp=2", "other parameters on worker 1"),
    ):
        with pytest.raises(WorkloadError, match=message):
            workers(2, build, factory, strategy)
    with pytest.raises(StrategyError, match="one dtype"):
        workers(2, build, mixed, "fsdp=2")
    with pytest.raises(StrategyError, match="needs 4 workers, there are 2"):
        workers(2, build, mlp, "dp=4")


def test_full_state_dict_and_loading_under_another_strategy(workers: Pools) -> None:
    """Pieces written by one strategy fill a program of another before its first step; both go on alike."""

    def go_on(strategy: str, result: Result, state: Any) -> tuple[list[float], Any, Any]:
        program = Program.build(language(), Strategy.parse(strategy))
        for piece in program.pieces():
            piece.local.copy_(piece.layout.cut(result.state[piece.name.removeprefix("model/")]))
        for name, full in result.optimizer.items():
            parameter, _, key = name.rpartition("/")
            found = program.optimizer_piece(parameter, key, full.shape, full.dtype)
            if found is not None:
                found.local.copy_(found.layout.cut(full))
        program.load_state(state)
        losses = [float(program.step_share(share)) for share in program.loader().shares(5)]
        return losses, program.state(), program.full_state_dict()

    start = train(workers, language, "fsdp=4")
    state = {
        "steps": 3,
        "groups": [{"lr": 1e-2 * 0.5**3, "initial_lr": 1e-2}],
        "scheduler": {"last_epoch": 3, "_last_lr": [1e-2 * 0.5**3]},
    }
    expected, expected_state, full = go_on("single", start, state)
    plain = language().model()
    assert isinstance(plain, Tied)
    plain.load_state_dict(full)
    assert plain.head.weight is plain.embed.weight
    for strategy in (*TWO, "dp=2,fsdp=2"):
        results = workers(Strategy.parse(strategy).workers, go_on, strategy, start, state)
        assert [losses for losses, _, _ in results] == [pytest.approx(expected, rel=1e-10)] * len(results)
        assert results[0][1] == expected_state
        assert all(weights is None for _, _, weights in results[1:])
        for name, tensor in results[0][2].items():
            torch.testing.assert_close(tensor, full[name])
