"""Parts of shardwise.compat.horovod that need no other rank, and a job of one rank."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise.compat.horovod as hvd
from shardwise.compat.horovod import launching, negotiation, requests
from shardwise.compat.horovod.elastic import loop, sampler, state
from shardwise.compat.horovod.execution import scaled, share_of
from shardwise.compat.horovod.requests import CollectiveRequest, disagreement
from shardwise.errors import RequestError
from shardwise.launch.ranks import RankContext


def asked(name: str = "x", *shape: int, **fields: object) -> CollectiveRequest:
    request = CollectiveRequest("allreduce", name, (shape or (2, 3),), ("float32",), op=requests.SUM)
    return replace(request, **fields)  # type: ignore[arg-type]


def test_a_request_travels() -> None:
    request = asked(root=1, splits=(1, 2), prescale=0.1)
    assert CollectiveRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (asked(), None),
        (asked("x", 3, 2), r"rank 0 has shapes \[\(2, 3\)\], rank 1 has \[\(3, 2\)\]"),
        (asked(dtypes=("int64",)), "dtypes float32, rank 1 has int64"),
        (asked(device="cuda"), "device cpu"),
        (asked(op=requests.MIN), "op Sum"),
        (asked(prescale=2.0), "prescale_factor 1.0"),
        (asked(kind="broadcast"), "kind allreduce"),
    ],
)
def test_requests_of_a_name_must_agree(other: CollectiveRequest, said: str | None) -> None:
    found = disagreement({0: asked(), 1: other}, (0, 1))
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(said, found)


def test_neighbours_are_fused_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiation, "FUSED_BYTES", 60)
    names = [asked(each) for each in "abc"] + [asked("d", op=requests.MAX), asked("e", kind="barrier"), asked("f")]
    batches = negotiation._fused([{0: request} for request in names])
    found = [[each[0].name for each in batch] for batch in batches]
    assert found == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


@pytest.mark.parametrize(
    ("dtype", "factor", "divisor", "wanted"),
    [(torch.int32, 0.5, 1, 3), (torch.int32, 1.0, 2, 3), (torch.float64, 0.5, 1, 3.5), (torch.float16, 1.0, 2, 3.5)],
)
def test_factors_truncate_whole_numbers(dtype: torch.dtype, factor: float, divisor: int, wanted: float) -> None:
    result = scaled(torch.tensor([7, -7]).to(dtype), factor, divisor)
    assert result.dtype == dtype
    assert result.tolist() == [wanted, -wanted]


def test_shares_cover_all_rows() -> None:
    for rows in range(12):
        shares = [share_of(rows, 4, place) for place in range(4)]
        assert [start for start, _ in shares] == [sum(count for _, count in shares[:place]) for place in range(4)]
        assert sum(count for _, count in shares) == rows


def test_calls_before_init_are_refused() -> None:
    assert not hvd.is_initialized()
    for call in (hvd.rank, hvd.size, lambda: hvd.allreduce(torch.ones(1)), hvd.join):
        with pytest.raises(RequestError, match=r"call shardwise.compat.horovod.init\(\) first"):
            call()


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rank and size, as the sampler sees them."""
    now = [0, 2]
    monkeypatch.setattr(sampler, "rank", lambda: now[0])
    monkeypatch.setattr(sampler, "size", lambda: now[1])
    return now


def test_samples_are_shared_again_after_a_change(two_ranks: list[int]) -> None:
    own = hvd.elastic.ElasticSampler(range(11), shuffle=False)
    assert (list(own), len(own)) == ([0, 2, 4, 6, 8, 10], 6)
    two_ranks[0] = 1
    own.reset()
    assert list(own) == [1, 3, 5, 7, 9, 0]  # as many as the other rank
    own.record_batch(0, 2)
    two_ranks[:] = [2, 3]
    other = hvd.elastic.ElasticSampler(range(11), shuffle=False)
    other.load_state_dict(own.state_dict())
    assert list(other) == [6, 9, 5]
    assert [other.remaining_indices[0], len(other)] == [4, 3]
    other.set_epoch(1)
    assert len(other) == 4
    shuffled = hvd.elastic.ElasticSampler(range(11), seed=3)
    assert sorted(shuffled.remaining_indices) == list(range(11)) != shuffled.remaining_indices
    first = list(shuffled)
    shuffled.set_epoch(1)
    assert list(shuffled) != first


def test_a_state_returns_to_its_last_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "local_rank", lambda: 0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept: Any = hvd.elastic.TorchState(model, optimizer, batch=0, more={"a": [1]})
    kept.batch, kept.more["a"] = 3, [2]
    kept.commit()
    with torch.no_grad():
        model.weight.fill_(9)
    optimizer.param_groups[0]["lr"] = 0.1
    kept.batch = 4
    kept.more["a"].append(5)
    kept.restore()
    assert (kept.batch, kept.more, optimizer.param_groups[0]["lr"]) == (3, {"a": [2]}, 0.5)
    assert model.weight.item() != 9


def context(**fields: object) -> RankContext:
    known = RankContext(rank=0, workers=2, local_rank=0, local_workers=2, address="localhost", port=1, elastic=True)
    return replace(known, **fields)  # type: ignore[arg-type]


def test_commits_outlive_the_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(state, "rank_context", context)
    monkeypatch.setattr(state, "local_rank", lambda: 0)
    monkeypatch.setattr(state, "gettempdir", lambda: str(tmp_path))
    first: Any = hvd.elastic.TorchState(torch.nn.Linear(1, 1), batch=0)
    first.batch = 7
    first.commit()
    second: Any = hvd.elastic.TorchState(torch.nn.Linear(1, 1), batch=0)
    second.recover()
    assert second.batch == 7
    assert torch.equal(second.model.weight, first.model.weight)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o755)
    with pytest.raises(RequestError, match="is not a folder that only you can enter"):
        second.commit()
    folder.chmod(0o700)
    second.finish()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(state, "rank_context", lambda: context(elastic=False))
    first.commit()
    assert list(tmp_path.iterdir()) == []  # nobody would start this worker again


def test_an_elastic_training_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("init", "shutdown", "barrier"):
        monkeypatch.setattr(loop, name, lambda name=name: called.append(name))

    class Broken:
        broken = False

    monkeypatch.setattr(loop, "negotiator_of", lambda _: Broken)
    monkeypatch.setattr(hvd.elastic.TorchState, "sync", lambda self: called.append(f"sync {self.batch}"))
    monkeypatch.setattr(state, "local_rank", lambda: 0)
    kept: Any = hvd.elastic.TorchState(batch=0)
    kept.register_reset_callbacks([lambda: called.append("reset")])
    failures = [hvd.HorovodInternalError("gone"), hvd.HostsUpdatedInterrupt("more"), None]

    @hvd.elastic.run
    def train(state: Any) -> str:
        state.batch += 1
        if (failure := failures.pop(0)) is not None:
            raise failure
        return "done"

    assert train(kept) == "done"
    again = ["shutdown", "init", "reset"]
    assert called == ["init", "sync 0", *again, "sync 0", *again, "sync 1", "barrier"]
    Broken.broken = True
    failures[:] = [hvd.HorovodInternalError("gone")]
    with pytest.raises(hvd.HorovodInternalError):
        train(kept)


def test_launching_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "run_local", subprocess.run)
    with pytest.raises(RequestError, match="np=0"):
        hvd.run(print, np=0)
    with pytest.raises(RequestError, match="there is no script"):
        launching.run_script("none.py", [], 2)
