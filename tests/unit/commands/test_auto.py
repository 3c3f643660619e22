"""`--strategy auto`: what is chosen for a machine, what is fallen back to, how a prediction is held to its word."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from predictions import prediction

from shardwise import api
from shardwise.cli import _say_error
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.commands import auto
from shardwise.commands.auto import Choice, choose, held, train_automatically
from shardwise.commands.request import TrainingRequest, settle_compared
from shardwise.errors import DoesNotFit, NotMeasured, RequestError, WorkerFailed
from shardwise.parallel import check
from shardwise.planner.plan import Candidate
from shardwise.predict.document import step_words
from shardwise.predict.profile import meta_model
from shardwise.run.calibration.local_cluster import check_hosts
from shardwise.run.training.result import Forecast
from shardwise.strategy import Strategy
from shardwise.workload import source
from shardwise.workload.load import load_workload

SPEC = "gpt:layers=1,hidden=64,heads=2,vocabulary=256,sequence=32,batch_size=4"


def candidate(spec: str, seconds: float, size: int) -> Candidate:
    return Candidate(Strategy.parse(spec), prediction(seconds, memory=size, error=None))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two devices, as a cluster file."""
    path = tmp_path / "machine.toml"
    write_cluster(find_cluster("a100-40x2"), path)
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(path))
    return path


def test_the_machine_at_hand_gets_the_fastest_of_all_numbers_of_workers(machine: Path) -> None:
    workload = load_workload(SPEC)
    choice = choose(workload, quiet=True)
    alone, two = choose(workload, 1, quiet=True), choose(workload, 2, quiet=True)
    assert alone.best.strategy.workers == 1
    assert two.best.strategy.workers == 2
    seconds = {each.best.prediction.step_seconds for each in (alone, two)}
    assert choice.best.prediction.step_seconds == min(seconds)
    assert any("Chosen: " in words for words in choice.words)


def test_a_machine_measured_with_fewer_workers_is_told(machine: Path) -> None:
    with pytest.raises(RequestError, match="shardwise calibrate --workers 8"):
        choose(load_workload(SPEC), 8, quiet=True)


def test_what_cannot_fit_is_told(machine: Path) -> None:
    cluster = find_cluster("a100-40x2")
    nodes = tuple(replace(n, device=replace(n.device, memory_bytes=1000)) for n in cluster.nodes)
    write_cluster(replace(cluster, nodes=nodes), machine)
    with pytest.raises(DoesNotFit, match=r"does not fit into this machine: .* needs least"):
        choose(load_workload(SPEC), quiet=True)


def test_without_measurements_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")
    with pytest.raises(NotMeasured, match="SHARDWISE_CLUSTER=off"):
        choose(load_workload(SPEC), quiet=True)


def test_fallbacks_need_less_and_less() -> None:
    choice = Choice(
        candidate("dp=2", 1.0, 100),
        (
            candidate("dp=2", 1.0, 100),
            candidate("fsdp=2", 1.1, 80),
            candidate("tp=2", 1.2, 79),
            candidate("pp=2", 2.0, 40),
        ),
        (),
    )
    assert [str(each.strategy) for each in choice.smaller()] == ["fsdp=2", "pp=2"]


def test_the_last_fallback_keeps_parameters_on_the_hosts(machine: Path) -> None:
    large = load_workload("gpt:layers=4,hidden=2048,heads=4,vocabulary=4096,sequence=16,batch_size=4")
    choice = choose(large, 2, quiet=True)
    last = choice.last_resort()
    assert last is not None
    assert last.strategy.offload == 1
    assert list(choice.smaller())[-1].strategy == last.strategy
    assert list(replace(choice, best=last).smaller()) == []


def out_of_memory() -> WorkerFailed:
    return WorkerFailed("worker 1 failed", rank=1, traceback="torch.OutOfMemoryError: CUDA out of memory. Tried ...")


def test_out_of_memory_is_told_from_other_ends() -> None:
    assert out_of_memory().out_of_memory
    assert WorkerFailed("x", rank=0, traceback="RuntimeError: [enforce fail] not enough memory: you").out_of_memory
    assert not WorkerFailed("x", rank=0, traceback="ValueError: wrong").out_of_memory


def test_what_needs_less_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    _say_error(out_of_memory())
    _say_error(WorkerFailed("worker 2 failed", rank=2, traceback="ValueError: wrong"))
    *_, less, _, other = capsys.readouterr().err.splitlines()
    assert less.startswith("shardwise: worker 1 ran out of memory, all workers have ended: less is needed with ")
    assert other == "shardwise: worker 2 failed, all workers have ended"


def run(monkeypatch: pytest.MonkeyPatch, outcomes: list[Any]) -> tuple[list[str], Any]:
    """Trains with a choice of three and what running each of them gives. Returns (strategies tried, document)."""
    tried: list[str] = []
    options = (candidate("dp=2", 1.0, 100), candidate("fsdp=2", 1.1, 50), candidate("pp=2", 2.0, 20))
    monkeypatch.setattr(auto, "choose", lambda *_, **__: Choice(options[0], options, ("needs", "Chosen: dp=2.")))
    monkeypatch.setattr(auto, "settle", lambda asked, *_, **__: SimpleNamespace(strategy=asked.strategy))

    def run_reported(job: Any) -> Any:
        tried.append(str(job.strategy))
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(summary=outcome)

    monkeypatch.setattr(auto, "run_reported", run_reported)
    return tried, lambda: train_automatically(TrainingRequest(SPEC), None)


def test_a_run_out_of_memory_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {"step_seconds": 2.0, "communication_share": 0.1}
    tried, train = run(monkeypatch, [out_of_memory(), out_of_memory(), summary])
    assert train()["verdict"] is None
    assert tried == ["dp=2", "fsdp=2", "pp=2"]
    told = capsys.readouterr().err
    assert "strategy dp=2 ran out of memory: trying fsdp=2" in told
    assert "strategy fsdp=2 ran out of memory: trying pp=2" in told


def test_unequal_stages_are_cut_as_they_were_planned(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    """Cut stages where they were found to fit; equal stages are cut by what training measures."""
    found = choose(load_workload(SPEC), 2, quiet=True)
    jobs: list[Any] = []

    def run(job: Any) -> SimpleNamespace:
        jobs.append(job)
        return SimpleNamespace(summary={"step_seconds": 0.0})

    for spec in ("pp=2,speeds=1:3", "pp=2", "dp=2"):
        best = candidate(spec, 1.0, 100)
        monkeypatch.setattr(auto, "choose", lambda *_, best=best, **__: replace(found, best=best, others=(best,)))
        monkeypatch.setattr(auto, "run_reported", run)
        train_automatically(TrainingRequest(SPEC, steps=1), machine.parent / spec, quiet=True)
    unequal, equal, whole = (job.cuts for job in jobs)
    assert [len(stage) for stage in unequal] == [1, 1]
    assert unequal[1][0] > 0
    assert not equal
    assert not whole


def test_a_workload_is_loaded_and_traced_once_and_trained_by_its_prediction(
    monkeypatch: pytest.MonkeyPatch, machine: Path
) -> None:
    counts: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((source, "load_workload"), (meta_model, "traced"), (check, "traced"), (auto, "own_cluster")):
        counting(owner, name)
    choice = choose(load_workload(SPEC), 2, quiet=True)
    alone = Counter(counts)
    counts.clear()
    jobs: list[Any] = []

    def run_reported(job: Any) -> SimpleNamespace:
        jobs.append(job)
        return SimpleNamespace(summary={"step_seconds": None})

    monkeypatch.setattr(auto, "run_reported", run_reported)
    train_automatically(TrainingRequest(SPEC, workers=2, steps=1), machine.parent / "run", quiet=True)
    assert alone["traced"] > 0
    assert counts == alone + Counter(load_workload=1)
    (job,) = jobs
    assert job.strategy == choice.best.strategy
    assert job.forecast == Forecast.of(choice.best.prediction)


def test_a_strategy_is_chosen_for_the_threads_that_it_will_have(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    cluster = find_cluster("a100-40x2")
    nodes = tuple(replace(n, device=replace(n.device, kind="cpu", cores=4)) for n in cluster.nodes)
    write_cluster(replace(cluster, nodes=nodes), machine)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    seen: list[int] = []

    def search(_: Any, on: Cluster, *__: Any) -> None:
        seen.extend(each.device.threads for each in on.nodes)
        raise DoesNotFit("enough")

    monkeypatch.setattr(auto, "search", search)
    with pytest.raises(DoesNotFit, match="enough"):
        choose(load_workload(SPEC), 2, quiet=True)
    assert seen == [3]


@pytest.mark.parametrize("outcomes", [[out_of_memory()] * 3, [WorkerFailed("x", rank=0, traceback="ValueError")]])
def test_other_failures_and_the_last_one_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[WorkerFailed]
) -> None:
    tried, train = run(monkeypatch, list(outcomes))
    with pytest.raises(WorkerFailed):
        train()
    assert len(tried) == len(outcomes)


def test_a_prediction_is_held_to_its_word() -> None:
    predicted = prediction(0.8, 0.2, error=None)
    assert held(predicted, {"step_seconds": 1.15, "communication_share": 0.2}) is None
    assert held(predicted, {"step_seconds": None}) is None
    slow = held(predicted, {"step_seconds": 2.0, "communication_share": 0.6})
    assert slow == (
        "A step took 2.0 s, predicted were 1.0 s: most wrong was waiting for other workers, 1.2 s instead of 200.0 ms."
    )
    assert "most wrong was computing" in str(held(predicted, {"step_seconds": 2.0, "communication_share": 0.1}))


def test_without_measurements_train_takes_dp_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")
    asked = TrainingRequest(SPEC, {}, None, None, 2)
    settled: list[TrainingRequest] = []

    def settle(given: TrainingRequest, *_: Any, **__: Any) -> None:
        settled.append(given)

    monkeypatch.setattr(auto, "settle", settle)
    monkeypatch.setattr(auto, "run_reported", lambda _: SimpleNamespace(summary={"loss": 1.0}))
    assert train_automatically(asked, None) == {"loss": 1.0}
    assert str(settled[0].strategy) == "dp=2"
    assert "strategy dp=2, for nothing can be chosen: this machine is not measured" in capsys.readouterr().err
    with pytest.raises(NotMeasured):
        train_automatically(replace(asked, strategy="auto"), None)


def test_several_hosts_want_a_file(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_hosts()
    monkeypatch.delenv("SHARDWISE_CLUSTER")
    with pytest.raises(NotMeasured, match="4 workers on several hosts have not been measured: run shardwise calibrate"):
        check_hosts()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_hosts()


def test_strategies_are_compared_once_each_in_their_own_words() -> None:
    spellings = ["dp=2", "single", "dp=2,microbatches=1", "dp=2,microbatches=2"]
    compared, refused = settle_compared(load_workload(SPEC), spellings, None)
    assert [str(strategy) for strategy in compared] == ["dp=2", "single", "dp=2,microbatches=2"]
    assert refused == []


def test_a_margin_is_a_share_and_of_a_strategy_that_is_chosen() -> None:
    with pytest.raises(RequestError, match=r"margin=1\.5: must be a share of the memory"):
        api.train(SPEC, margin=1.5)
    with pytest.raises(RequestError, match="only a strategy that is chosen leaves a margin"):
        api.train(SPEC, strategy="dp=2", margin=0.1)
    with pytest.raises(RequestError, match="must be a share of the memory"):
        api.simulate(SPEC, ["single"], cluster="a100-40x2", margin=-0.1)
    with pytest.raises(RequestError, match="must be a share of the memory"):
        api.plan(SPEC, cluster="a100-40x2", margin=1.0)


@pytest.mark.usefixtures("machine")
def test_a_choice_leaves_the_margin_that_is_asked_for() -> None:
    choice = choose(load_workload(SPEC), 1, quiet=True, margin=0.5)
    assert choice.best.prediction.margin == 0.5
    assert "with 50% of its 39.4 GiB left free" in choice.words[1]
    assert f". A step of Shardwise's own program takes {step_words(choice.best.prediction)} in bf16" in choice.words[1]


def test_a_forecast_counts_what_a_run_measures() -> None:
    found = prediction(1.0, memory=100, error=None)
    found = replace(found, memory=replace(found.memory, process=20, fragments=11, context=500))
    assert Forecast.of(found).memory_bytes == 120
