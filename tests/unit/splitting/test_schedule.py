from __future__ import annotations

import pytest

from shardwise.splitting.schedule import Action, order, remaining, streamed


def run(tables: list[list[Action]], stages: int) -> int:
    """Executes the tables of all workers with what each action waits for; how many actions were done."""
    done: set[tuple[str, int, int]] = set()
    at = [0] * len(tables)
    moved = True
    while moved:
        moved = False
        for worker, table in enumerate(tables):
            while at[worker] < len(table) and needs(table[at[worker]], stages) <= done:
                action = table[at[worker]]
                done.add(("I" if action.kind in "BI" else action.kind, action.stage, action.microbatch))
                at[worker] += 1
                moved = True
    return sum(at)


def needs(action: Action, stages: int) -> set[tuple[str, int, int]]:
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F":
        return {("F", stage - 1, microbatch)} if stage else set()
    if kind == "W":
        return {("I", stage, microbatch)}
    after = {("I", stage + 1, microbatch)} if stage < stages - 1 else set()
    return {("F", stage, microbatch)} | after


@pytest.mark.parametrize("last_whole", [False, True])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_every_schedule_ends_and_does_everything_once(schedule: str, workers: int, last_whole: bool) -> None:
    for chunks in (2, 3) if schedule == "interleaved" else (1,):
        for microbatches in (1, 2, 3, 4, 8, 9, 16):
            tables = [order(schedule, w, workers, chunks, microbatches, last_whole=last_whole) for w in range(workers)]
            stages = workers * chunks
            assert run(tables, stages) == sum(map(len, tables))
            for stage in range(stages):
                for microbatch in range(microbatches):
                    table = tables[stage % workers]
                    kinds = "".join(a.kind for a in table if (a.stage, a.microbatch) == (stage, microbatch))
                    assert kinds in ("FB", "FIW")


def test_the_tables_that_are_drawn() -> None:
    def drawn(schedule: str, worker: int) -> str:
        return " ".join(f"{a.kind}{a.microbatch}" for a in order(schedule, worker, 3, 1, 4))

    assert drawn("gpipe", 0) == "F0 F1 F2 F3 B0 B1 B2 B3"
    assert drawn("1f1b", 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert drawn("1f1b", 1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert drawn("1f1b", 2) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert drawn("zero-bubble", 0) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3"
    assert drawn("zero-bubble", 2) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"


def test_one_forward_one_backward_keeps_few_activations() -> None:
    for worker in range(4):
        kept = most = 0
        for action in order("1f1b", worker, 4, 1, 16):
            kept += 1 if action.kind == "F" else -1
            most = max(most, kept)
        assert most == 4 - worker


def test_gradients_that_are_reduced_as_they_appear_come_last() -> None:
    for worker in range(4):
        table = order("zero-bubble", worker, 4, 1, 8, last_whole=True)
        assert table[-1] == Action("B", worker, 7)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("extra", [-1, 0, 1, 7])
def test_steps_without_an_end_do_everything_once_with_as_much_in_flight(workers: int, extra: int) -> None:
    count, steps = workers + extra, 4
    for worker in range(workers):
        actions = [
            action
            for step in range(steps)
            for action in streamed(worker, workers, count, step % 2, left=step > 0, goes_on=True)
        ]
        actions += remaining(worker, workers, count, (steps - 1) % 2)
        window = range(2 * count)
        assert [a.microbatch for a in actions if a.kind == "F"] == [m for _ in range(steps // 2) for m in window]
        assert [a.microbatch for a in actions if a.kind == "B"] == [m for _ in range(steps // 2) for m in window]
        flying, most = 0, 0
        for action in actions:
            flying += 1 if action.kind == "F" else -1
            most = max(most, flying)
        assert flying == 0
        assert most <= workers - worker, "no more than in 1f1b"


def test_the_steps_without_an_end_that_are_drawn() -> None:
    def drawn(worker: int, *, left: bool) -> str:
        return " ".join(f"{a.kind}{a.microbatch}" for a in streamed(worker, 3, 4, int(left), left=left))

    assert drawn(0, left=False) == "F0 F1 F2 B0 F3 B1"
    assert drawn(0, left=True) == "F4 B2 F5 B3 F6 B4 F7 B5"
    assert drawn(1, left=True) == "F4 B3 F5 B4 F6 B5 F7 B6"
    assert drawn(2, left=True) == "F4 B4 F5 B5 F6 B6 F7 B7"
    assert streamed(0, 3, 4, goes_on=False, left=False) == order("1f1b", 0, 3, 1, 4)
