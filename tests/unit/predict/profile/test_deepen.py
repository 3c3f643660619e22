"""A profile made from a few layers is the profile of all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise import Strategy, Workload
from shardwise.predict.profile import meta_model
from shardwise.predict.profile.deepen import deepened
from shardwise.predict.profile.meta_model import SHORT, Model, builds
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.profiler import Profiles, profile
from shardwise.workload.load import load_workload

GPT = "gpt:layers=6,hidden=64,heads=4,sequence=16,vocabulary=300"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "tie_word_embeddings": True}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def whole(monkeypatch: pytest.MonkeyPatch, workload: Workload, **kind: Any) -> Profile:
    """The profile for which all layers were looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(meta_model, "repeated_layers", lambda module: None)
        return profile(workload, **kind)


@pytest.fixture(scope="module")
def both() -> tuple[Profiles, Profiles]:
    """Profiles of few and of all layers, from models that are traced once."""
    short, long = Profiles(load_workload(GPT)), Profiles(load_workload(GPT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_model, "repeated_layers", lambda module: None)
        long.of(Strategy())
    return short, long


@pytest.mark.parametrize(
    "strategy",
    [
        "single",
        "tp=2",
        "dp=2,tp=4,sp=1",
        "pp=2,schedule=zero-bubble",
        "tp=2,pp=2,sp=1,schedule=zero-bubble,precision=float32",
    ],
)
def test_gpt(both: tuple[Profiles, Profiles], strategy: str) -> None:
    few, all_of_them = (profiles.of(Strategy.parse(strategy)) for profiles in both)
    assert few == all_of_them


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gpt:layers=6,hidden=64,heads=4,kv_heads=2,sequence=32,tied=true", {}), ("image", {"layers": 6})],
)
def test_tied_and_other_recipes(monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]) -> None:
    workload = load_workload(name, settings)
    assert profile(workload, microbatch=2, tp=2) == whole(monkeypatch, workload, microbatch=2, tp=2)


@pytest.mark.parametrize("config", [LLAMA, BERT], ids=lambda config: config["model_type"])
def test_huggingface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config | SIZES))
    workload = load_workload(str(tmp_path), {"sequence": "32"})
    assert profile(workload, microbatch=2, tp=2) == whole(monkeypatch, workload, microbatch=2, tp=2)


def test_only_a_few_layers_are_looked_at() -> None:
    model = next(builds(load_workload(GPT)))
    assert model.layers is not None
    with model.short() as module:
        assert len(module.blocks) == SHORT  # type: ignore[arg-type]
        names = {name.split(".")[1] for name in model.step(1).tensors.values() if name.startswith("blocks")}
    assert names == {"0", "1", "2", "3"}
    assert len(module.blocks) == 6  # type: ignore[arg-type]
    assert len(model.blocks(1)) == 6


class Chain(nn.Module):
    """Equal layers, of which some are skipped, or whose outputs are all used at the end."""

    def __init__(self, skipped: int = -1, gathers: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
        self.skipped, self.gathers = skipped, gathers

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for number, layer in enumerate(self.layers):
            if number != self.skipped:
                x = layer(x).relu()
                found.append(x)
        return torch.stack(found).sum(0) if self.gathers else x


@pytest.mark.parametrize("module", [Chain(gathers=True), Chain(skipped=2)], ids=["gathers", "skips"])
def test_layers_that_are_used_differently_are_all_looked_at(monkeypatch: pytest.MonkeyPatch, module: Chain) -> None:
    workload = Workload(
        name="chain",
        model=lambda: Chain(module.skipped, module.gathers),
        dataset=[{"x": torch.ones(8)}] * 4,
        inputs=lambda batch: batch["x"],
        loss=lambda output, batch: output.mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=4,
    )
    found = profile(workload, microbatch=4)
    assert found == whole(monkeypatch, workload, microbatch=4)
    assert len(found.blocks) in (0, 6)


def test_what_differs_is_not_repeated() -> None:
    workload = load_workload(GPT)
    model: Model = next(builds(workload))
    short = profile(load_workload(GPT, {"layers": 4}), microbatch=1)
    prefixes = model.prefixes()
    longer = deepened(short, prefixes)
    assert longer is not None
    assert len(longer.segments) == len(short.segments) + 2 * 7
    other = replace(short.segments[9], message=1)
    assert deepened(replace(short, segments=(*short.segments[:9], other, *short.segments[10:])), prefixes) is None
    assert deepened(replace(short, ready=tuple(sorted(short.ready))), prefixes) is None
    first, *others = [index for index, value in enumerate(short.values) if 9 <= value.made < 16]
    assert others
    values = (*short.values[:first], replace(short.values[first], held=1), *short.values[first + 1 :])
    assert deepened(replace(short, values=values), prefixes) is None


@pytest.mark.parametrize(("pattern", "few"), [("blocks.*.norm?", True), ("blocks.4.mlp", False), ("blocks.?", True)])
def test_layers_that_stay_in_float32_are_repeated_if_all_of_them_do(
    monkeypatch: pytest.MonkeyPatch, pattern: str, few: bool
) -> None:
    workload = replace(load_workload(GPT), float32=(pattern,))
    model = next(builds(workload))
    assert (model.layers is not None) == few
    short = profile(workload, microbatch=2)
    assert short == whole(monkeypatch, workload, microbatch=2)
    kept = [each.name for each in short.parameters if each.kept]
    assert len(kept) == {"blocks.*.norm?": 6 * 2, "blocks.4.mlp": 3, "blocks.?": 6 * 7}[pattern]
    assert not any(each.kept for each in profile(workload, microbatch=2, precision="float32").parameters)
