"""A Lightning module and the objects of an Accelerate script train as their own loops do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from equality import assert_equal, reference, train
from models import points
from pool import Pools
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from shardwise.compat import accelerate as from_accelerate
from shardwise.compat import lightning as from_lightning
from shardwise.errors import WorkloadError
from shardwise.workload.workload import Workload

lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(points(24), batch_size=8, **options)


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.dim() <= 1], "lr": 0.02},
    ]


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, configure: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.configure = network(), configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def adam(module: Any) -> Any:
    return torch.optim.AdamW(grouped(module), lr=0.01)


def each_step(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[3])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": "step"}}


def each_epoch(module: Any) -> Any:
    optimizer = adam(module)
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 0.1**n])]


def classifier(configure: Callable[[Any], Any]) -> Workload:
    return from_lightning.workload(Classifier(configure), loader(), max_epochs=2, gradient_clip_val=0.5)


CONFIGURATIONS = (adam, each_step, each_epoch)


@pytest.mark.parametrize("configure", CONFIGURATIONS)
def test_trains_as_the_trainer_does(configure: Callable[[Any], Any], tmp_path: Any) -> None:
    from shardwise.parallel.program import Program
    from shardwise.strategy import Strategy

    module = Classifier(configure)
    trainer = lightning.Trainer(
        max_epochs=2,
        gradient_clip_val=0.5,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader())
    program = Program.build(classifier(configure), Strategy.parse("single"))
    for epoch in range(2):
        for share in program.loader().shares(epoch):
            program.step_share(share)
        program.next_epoch({})
    got = {piece.name.removeprefix("model/"): piece.local for piece in program.pieces()}
    for name, parameter in module.named_parameters():
        assert torch.allclose(got[name], parameter, atol=1e-10), name


def stepping() -> Workload:
    return classifier(each_step)


def grouping() -> Workload:
    return classifier(adam)


@pytest.mark.parametrize("factory", [stepping, grouping])
@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2"])
def test_a_module_trains_alike_under_every_strategy(
    workers: Pools, factory: Callable[[], Workload], strategy: str
) -> None:
    assert_equal(train(workers, factory, strategy), reference(workers, factory, strategy), 1e-10)


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def parts() -> tuple[Any, Any, Any, Any]:
    model = network()
    optimizer = torch.optim.AdamW(grouped(model), lr=0.01)
    return model, optimizer, loader(), torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def from_script(**options: Any) -> Workload:
    model, optimizer, data, scheduler = parts()
    return from_accelerate.workload(model, optimizer, data, loss, scheduler=scheduler, **options)


@pytest.mark.parametrize("passes", [1, 3])
def test_trains_as_accelerate_does(workers: Pools, passes: int) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
    model, optimizer, data, scheduler = accelerator.prepare(*parts())
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    steps = 3 // passes
    result = train(
        workers, lambda: from_script(clip_norm=0.5, gradient_accumulation_steps=passes), "single", steps=steps
    )
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        assert torch.allclose(result.state[name], parameter, atol=1e-10), name


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2"])
def test_a_script_trains_alike_under_every_strategy(workers: Pools, strategy: str) -> None:
    assert_equal(train(workers, from_script, strategy), reference(workers, from_script, strategy), 1e-10)


def test_the_loader_is_taken_over() -> None:
    made = from_script(processes=2, gradient_accumulation_steps=3)
    assert made.batch_size == 8 * 2 * 3
    assert not made.loading.shuffle
    model, optimizer, _, _ = parts()
    draws = WeightedRandomSampler([1.0] * 24, 10)
    other = from_accelerate.workload(model, optimizer, loader(sampler=draws, drop_last=True, num_workers=2), loss)
    assert (other.loading.sampler, other.loading.drop_last, other.loading.processes) == (draws, True, 1)
    assert from_accelerate.workload(model, optimizer, loader(shuffle=True), loss).loading.shuffle


def two_optimizers(module: Any) -> Any:
    return [torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.SGD(module.parameters(), lr=0.1)]


def manual() -> Any:
    module = Classifier(adam)
    module.automatic_optimization = False
    return from_lightning.workload(module, loader())


def batched() -> Any:
    model, optimizer, _, _ = parts()
    sampler = BatchSampler(SequentialSampler(range(24)), 8, drop_last=False)
    return from_accelerate.workload(model, optimizer, DataLoader(points(24), batch_sampler=sampler), loss)


class Hooked(Classifier):
    def on_train_batch_end(self, *_: Any) -> None:
        raise NotImplementedError


class Alone(Classifier):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return F.cross_entropy(self.net(batch[0]), batch[1]) * (self.asked() if self.asked else 1)

    asked: Any = None


def test_a_step_may_leave_out_the_number_of_its_batch() -> None:
    made = from_lightning.workload(Alone(adam), loader())
    assert made.step is not None
    model, batch = made.model(), next(iter(loader()))
    value = made.step(model, batch)  # type: ignore[operator]
    assert float(value) == float(F.cross_entropy(model.net(batch[0]), batch[1]))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["current_epoch", "global_step", "trainer.optimizers"])
def test_values_of_a_trainer_are_refused(name: str) -> None:
    module = from_lightning.workload(Alone(adam), loader())
    model: Any = copy.deepcopy(module.model())
    model.asked = lambda: eval(f"model.{name}", {"model": model})
    with pytest.raises(WorkloadError, match=f"asks its Trainer for {name.rpartition('.')[2]}, and there is none"):
        module.step(model, next(iter(loader())))  # type: ignore[operator, misc]


def test_hooks_are_left_out_only_by_name() -> None:
    made = from_lightning.workload(Hooked(adam), loader(), without=["on_train_batch_end"])
    assert made.name == "Hooked"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_lightning.workload(Hooked(adam), loader()), "has on_train_batch_end, which nothing calls here"),
        (lambda: from_lightning.workload(Classifier(adam), lightning.LightningDataModule()), "a data module has it as"),
        (manual, "optimizes by itself"),
        (lambda: classifier(two_optimizers), "makes 2 optimizers"),
        (lambda: from_lightning.workload(Classifier(adam), loader(), precision="16-mixed"), "precision='16-mixed'"),
        (lambda: from_accelerate.workload(network(), parts()[1], loader(), loss), "it must hold exactly these"),
        (batched, "batch sampler of its own"),
    ],
)
def test_refuses_in_one_line(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        make()
