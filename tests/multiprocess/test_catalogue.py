"""Models that nobody here wrote train under every strategy as on one process; the result is docs/models.md.

`make test` tries each model under one of the strategies, `make models` under all of them, and writes the document.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import catalogue
import pytest
from catalogue_table import Cell, write
from pool import Pools
from traces import remembered

from shardwise import Strategy
from shardwise.run.verification import verify
from shardwise.workload.source import Source

PRELOAD = ("transformers.models.llama.modeling_llama", "monai.networks.nets")
STRATEGIES = ("fsdp=2", "tp=2,microbatches=2", "pp=2,microbatches=2", "dp=2,tp=2", "tp=2,pp=2,microbatches=2")
"""All of them with microbatches of four samples, so that a model is traced once."""

STEPS = 2
ALL = "SHARDWISE_ALL_MODELS" in os.environ
CELLS = [
    (model, strategy)
    for number, model in enumerate(catalogue.KINDS)
    for turn, strategy in enumerate(STRATEGIES)
    if ALL or number % len(STRATEGIES) == turn
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def trial(folder: Path, model: str, strategy: str) -> verify.StrategyTrial:
    return verify.StrategyTrial(
        source=Source(workload=f"catalogue:{model}"),
        strategy=Strategy.parse(strategy).for_batch(catalogue.BATCH),
        steps=STEPS,
        float64=True,
        folder=str(folder),
    )


@pytest.fixture(scope="module")
def recorded(workers: Pools, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """One worker's steps, recorded once for each model and number of microbatches."""
    folders: dict[tuple[str, int], Path] = {}

    def get(model: str, strategy: str) -> Path:
        count = Strategy.parse(strategy).for_batch(catalogue.BATCH).microbatches
        if (model, count) not in folders:
            folders[model, count] = tmp_path_factory.mktemp("alone")
            workers(1, verify.record, trial(folders[model, count], model, f"microbatches={count}"))
        return folders[model, count]

    return get


@pytest.fixture(scope="module")
def cells() -> Iterator[dict[tuple[str, str], Cell]]:
    """Collect the findings; the document is written when all are there."""
    found: dict[tuple[str, str], Cell] = {}
    yield found
    if len(found) == len(catalogue.KINDS) * len(STRATEGIES):
        write(DOCUMENT, found, STRATEGIES)


@pytest.mark.parametrize(("model", "strategy"), CELLS)
def test_trains_as_in_one_process(
    model: str, strategy: str, workers: Pools, recorded: Callable[[str, str], Path], cells: dict[Any, Cell]
) -> None:
    work = trial(recorded(model, strategy), model, strategy)
    proof = workers(work.strategy.workers, compare, work)[0]
    assert proof.passed, proof
    assert max(proof.loss.error, proof.gradient.error, proof.parameter.error) < 1e-10
    if work.strategy.tp > 1:
        assert proof.sharded_share >= catalogue.LEAST[catalogue.KINDS[model]], proof.uncut
    cells[model, strategy] = Cell.of(proof)


def compare(work: verify.StrategyTrial) -> Any:
    with remembered((work.source, work.float64)):
        return verify.compare(work)


def test_the_document_has_all_of_them() -> None:
    text = DOCUMENT.read_text()
    for model in catalogue.KINDS:
        assert f"| {catalogue.name_of(model)} |" in text
    for strategy in STRATEGIES:
        assert f"`{strategy}`" in text
