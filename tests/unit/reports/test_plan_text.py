"""Words of a plan: grammatical for one, equal where predictions are, and with what a plan costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.cluster.find import find_cluster
from shardwise.planner.explain import longer_words, others_are_slower
from shardwise.planner.scaling import price, price_words
from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profile import Parameter
from shardwise.predict.workers.padding import padding_notes
from shardwise.reports.plan import worth_words
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload


def rows(*fitting: bool) -> list[dict[str, Any]]:
    return [{"workers": 2**n, "strategy": "dp=2" if fits else None} for n, fits in enumerate(fitting)]


def test_how_many_devices_pay() -> None:
    assert worth_words(None, rows(False, False)) == "No number of devices fits."
    assert worth_words(2, rows(False, True)) == "Of these numbers of devices only 2 fits."
    assert worth_words(1, rows(True, True)).startswith("More than 1 device do not pay")
    assert worth_words(4, rows(True, True, True)).startswith("Up to 4 devices, each added one brings")


def test_how_much_longer_a_step_takes() -> None:
    assert longer_words(0.002) == longer_words(-0.009) == "takes as long within 1%"
    assert (longer_words(0.123), longer_words(-0.05)) == ("takes 12% longer", "takes 5% less")
    assert others_are_slower(1) == "The only other strategy that may fit is slower."
    assert others_are_slower(1200) == "The other 1,200 strategies that may fit are slower."


def test_a_plan_costs_what_its_devices_do() -> None:
    class Of:
        workers, rate = 8, 100.0

    point: Any = Of()
    found = price(point, find_cluster("p5x16"))
    assert found is not None
    assert found["dollars_per_hour"] == pytest.approx(98.32)
    assert found["dollars_per_million_samples"] == pytest.approx(98.32 / 3600 / 100 * 1e6)
    words = price_words(found, 8)
    assert words.startswith("8 devices cost $98.32 an hour (list price on demand in the United States, 2024)")
    assert price_words(found, 1).startswith("1 device costs")
    assert price(point, find_cluster("h100x8")) is None, "a DGX has no list price by the hour"


def test_experts_with_fewer_rows_than_workers_are_noted() -> None:
    class Few:
        parameters = (Parameter("experts", (8, 64, 64), 4, (0,)), Parameter("head", (1024, 64), 4, (0,)))
        memo = Memo()

    profile: Any = Few()
    note = padding_notes(profile, Strategy(fsdp=64))
    assert "experts (8 rows) has fewer rows than there are workers" in note[0]
    assert padding_notes(profile, Strategy(fsdp=8)) == padding_notes(profile, Strategy(dp=64)) == ()


def test_a_folder_in_float16_says_that_it_trains_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, **sizes}

    def loaded(dtype: str, **settings: str) -> tuple[str, bool]:
        (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
        workload = load_workload(str(tmp_path), settings)
        return workload.precision, any("precision: float32" in note for note in workload.notes)

    assert loaded("bfloat16") == ("bf16", False)
    assert loaded("float32") == ("float32", False)
    assert loaded("float16") == ("float32", True)
    assert loaded("float16", precision="bf16") == ("bf16", False)
