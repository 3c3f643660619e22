"""A log gives back what was appended, in order; an event that is not whole is cut off."""

from __future__ import annotations

from pathlib import Path

import torch

from shardwise.parallel.servers.frames import Frame, Kind, parts_of_frame
from shardwise.parallel.servers.journal import Journal


def event(number: int) -> Frame:
    return Frame(Kind.PUSH, {"number": number}, {"g/a": torch.full((3,), float(number))})


def numbers(folder: Path) -> list[int]:
    journal = Journal(folder)
    found = [each.facts["number"] for each in journal.replay()]
    journal.close()
    return found


def appended(folder: Path, *events: int) -> Journal:
    journal = Journal(folder)
    list(journal.replay())
    for number in events:
        journal.append(event(number))
    return journal


def test_events_come_back_in_order(tmp_path: Path) -> None:
    appended(tmp_path, 1, 2).close()
    appended(tmp_path, 3).close()
    assert numbers(tmp_path) == [1, 2, 3]


def test_an_event_that_is_not_whole_is_cut_off_and_others_follow(tmp_path: Path) -> None:
    appended(tmp_path, 1, 2).close()
    whole = b"".join(parts_of_frame(event(3)))
    for end in (1, 20, len(whole) - 1):
        with (tmp_path / "events-0").open("ab") as file:
            file.write(whole[:end])
        assert numbers(tmp_path) == [1, 2]
    appended(tmp_path, 4).close()
    assert numbers(tmp_path) == [1, 2, 4]


def test_a_state_replaces_the_events_before_it(tmp_path: Path) -> None:
    journal = appended(tmp_path, 1, 2)
    assert journal.event_bytes
    journal.begin(Frame(Kind.STATE, {"number": 100}))
    assert not journal.event_bytes
    journal.append(event(3))
    journal.close()
    assert numbers(tmp_path) == [100, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events-1", "state-1"]


def test_a_server_killed_while_it_writes_its_state_has_the_events(tmp_path: Path) -> None:
    appended(tmp_path, 1, 2).close()
    (tmp_path / "part").write_bytes(b"half of a state")
    assert numbers(tmp_path) == [1, 2]
    journal = appended(tmp_path)
    journal.begin(Frame(Kind.STATE, {"number": 100}))
    journal.close()
    (tmp_path / "events-1").unlink()  # killed after the state was renamed, before the events began
    assert numbers(tmp_path) == [100]
