from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from shardwise.run.training.metrics import (
    Sampler,
    TrainingClock,
    communicating,
    length,
    merged,
    overlap,
    sampled_steps,
    summarize,
    typical,
)
from shardwise.run.training.process_memory import REFERENCES, only_new_garbage, peak_memory
from shardwise.run.training.result import Step

CPU = torch.device("cpu")


def step(number: int, seconds: float | None, samples: int = 8) -> Step:
    return Step(number, 0, 1.0, 0.1, None, samples, seconds)


def test_intervals() -> None:
    #  0 1 2 3 4 5 6 7
    #  ===   =====       a
    #    =====     ===   b
    a, b = merged([(3, 5), (0, 2), (4, 6)]), merged([(1, 4), (6, 8)])
    assert a == [(0, 2), (3, 6)]
    assert length(a) == 5
    assert overlap(a, b) == overlap(b, a) == 2
    assert overlap(a, []) == 0
    assert merged([]) == []


def event(name: str, start: float, end: float, *children: FunctionEvent) -> FunctionEvent:
    made = FunctionEvent(id=0, name=name, thread=0, start_us=start * 1e6, end_us=end * 1e6)  # type: ignore[no-untyped-call]
    made.cpu_children = list(children)
    return made


def test_communicating_is_what_is_not_hidden_behind_computing() -> None:
    # all-reduce from 1 to 5; the kernel of a matrix product from 2 to 4 inside an operation that waits until 5
    kernel = event("aten::mm", 2, 4)
    events = [event("gloo:all_reduce", 1, 5), event("aten::linear", 2, 5, kernel), kernel, event("aten::add", 6, 7)]
    communication, exposed = communicating(events, CPU)
    assert abs(communication - 4) < 1e-9
    assert abs(exposed - 2) < 1e-9


def test_ranges_that_the_program_names_are_no_computing_on_a_gpu() -> None:
    events = [event("ncclDevKernel_AllGather", 1, 3), event("gemm", 2, 4), event("FSDP::all_gather", 1, 3)]
    events[2].is_user_annotation = True
    for each in events:
        each.device_type = DeviceType.CUDA
    communication, exposed = communicating(events, torch.device("cuda"))
    assert abs(communication - 2) < 1e-9
    assert abs(exposed - 1) < 1e-9


def test_the_first_step_counts_only_if_alone() -> None:
    assert typical([step(1, 9.0), step(2, 1.0), step(3, 2.0), step(4, 4.0)]) == (2.0, 4.0)
    assert typical([step(1, 4.0)]) == (4.0, 2.0)
    assert typical([step(1, None)]) == (None, None)
    assert typical([]) == (None, None)


def test_sampled_steps() -> None:
    assert list(sampled_steps(None)) == [3, 4]
    assert list(sampled_steps(6)) == [3, 4]
    assert list(sampled_steps(5)) == [4]
    assert list(sampled_steps(3)) == [2]
    assert list(sampled_steps(2)) == []
    assert list(sampled_steps(0)) == []


def test_clock_on_the_cpu_reads_at_once() -> None:
    clock = TrainingClock(CPU)
    (first,) = clock.add(step(1, None), torch.tensor(2.5), torch.tensor(0.5), {})
    assert (first.loss, first.gradient_norm) == (2.5, 0.5)
    assert first.seconds is not None
    assert first.seconds > 0
    (second,) = clock.add(step(2, None), torch.tensor(2.0), None, {}, timed=False)
    assert (second.seconds, second.samples_per_second, second.gradient_norm) == (None, None, None)
    assert clock.drain() == []


def test_clock_on_a_gpu_reads_one_step_late() -> None:
    clock = TrainingClock(torch.device("meta"))  # stands for a device that is not the CPU
    assert clock.add(step(1, None), torch.tensor(2.5), None, {}) == []
    (first,) = clock.add(step(2, None), torch.tensor(2.0), None, {})
    assert (first.step, first.loss) == (1, 2.5)
    (second,) = clock.drain()
    assert (second.step, second.loss) == (2, 2.0)


def test_sampler_profiles_only_its_steps() -> None:
    sampler = Sampler(CPU, range(1, 2))
    for number in range(3):
        with sampler.step(number):
            torch.ones(100, 100) @ torch.ones(100, 100)
    assert len(sampler.spent) == 1
    assert sampler.spent[0].communication == sampler.spent[0].exposed == 0
    assert sampler.spent[0].step > 0


@pytest.mark.skipif(not REFERENCES.exists(), reason="the system does not look for peaks anew")
def test_what_the_profiler_needs_is_not_the_trainings() -> None:
    """A profiled step that needs much more than the others, as its profiler may, leaves no trace."""
    sampler = Sampler(CPU, range(1, 2))
    large = peak_memory(CPU)
    for number in range(3):
        with sampler.step(number):
            torch.ones(large // 4 if number == 1 else 1)
    assert sampler.peak_memory() < 1.5 * large
    torch.ones(large // 4)
    assert sampler.peak_memory() > 1.5 * large  # what others need counts


def test_summary_of_all_workers() -> None:
    two = [{"memory_bytes": 10, "spent": [4.0, 2.0, 1.0]}, {"memory_bytes": 30, "spent": [4.0, 1.0, 1.0]}]
    assert summarize(two) == {
        "memory_bytes": 30,
        "memory_bytes_by_worker": [10, 30],
        "alpha": 3 / 6,
        "exposed_alpha": 2 / 6,
        "communication_share": 2 / 8,
    }
    assert summarize([{"memory_bytes": 10, "spent": None}])["alpha"] == 0  # one worker has nobody to talk to
    assert summarize([{"memory_bytes": 10, "spent": None}] * 2)["alpha"] is None


def test_peak_memory_grows_with_what_is_used() -> None:
    before = peak_memory(CPU)
    size = 2 * before  # certainly a new peak, whatever other tests needed
    torch.ones(size // 4)
    assert peak_memory(CPU) > before + size // 2


def test_collections_in_the_block_pass_over_what_is_older() -> None:
    class Node:
        def __init__(self) -> None:
            self.own = self  # a cycle: only a collection frees it

    gc.unfreeze()
    old, frozen = Node(), gc.get_freeze_count()
    seen = weakref.ref(old)
    with only_new_garbage():
        del old
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None
        assert seen() is not None
    gc.collect()
    assert seen() is None
    assert gc.get_freeze_count() == frozen == 0


def test_objects_that_somebody_has_frozen_stay_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with only_new_garbage():
        pass
    assert 0 < gc.get_freeze_count() <= count  # one that is no longer used is freed all the same
