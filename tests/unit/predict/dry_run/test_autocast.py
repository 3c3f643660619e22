"""The kernels of a profile are those that the module runs uncut, in every precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from shardwise.predict.dry_run.dry_run import dry_run
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profiler import Profiles
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt
from shardwise.workload.recipes.medical import medical
from shardwise.workload.trace.graph import _StepModule
from shardwise.workload.workload import Workload, call_model

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "grouped heads": lambda: gpt(2, 256, 4, 2, vocabulary=1024, sequence=128, batch_size=4),
    "convolutions": lambda: medical(batch_size=2),
}

SMALL = 64
"""Elements up to which a kernel works on scalars: losses and their weights."""

NO_PASS = ("aten._foreach", "aten.equal")
"""Starts of the names of kernels that are no part of a pass: of the optimizer, and comparisons of random states."""


CASTS = {"aten._to_copy"}
"""Kernels of a step that makes copies of the parameters, and casts their gradients."""


def compared(workload: Workload, precision: str) -> tuple[Counter[Any], Counter[Any]]:
    """Count equal kernels of the passes: of the profile, and of the program."""
    strategy = Strategy.parse(f"single,precision={precision}").for_batch(workload.batch_size)
    passes = [
        each for s in Profiles(workload, "gpu").of(strategy).segments for each in (s.layer.forward, s.layer.backward)
    ]
    run = dry_run(workload, strategy, device="gpu")
    happened = [event.what for event in run.events if event.mark and isinstance(event.what, Kernel)]
    return counted([kernel for each in passes for kernel in each.kernels]), counted(
        [kernel for kernel in happened if not kernel.operation.startswith(NO_PASS)]
    )


def counted(kernels: list[Kernel]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for each in kernels:
        if each.kind != "memory" or each.shape > (SMALL,):
            found[each.operation, each.dtype, each.shape, each.bytes, each.backward] += each.count
    return found


@pytest.mark.parametrize("precision", ["float32", "bf16", "autocast"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_profile_has_the_kernels_of_the_module(name: str, precision: str) -> None:
    profiled, ran = compared(WORKLOADS[name](), precision)
    assert profiled - ran == Counter()
    more = {operation for operation, *_ in ran - profiled}
    assert more <= (CASTS if precision != "float32" else set())


def test_a_trace_without_autocast_is_noticed() -> None:
    def called(self: Any, batch: Any) -> Any:
        return call_model(self.model, self._workload.inputs(batch))

    with mock.patch.object(_StepModule, "_called", called):
        profiled, ran = compared(WORKLOADS["grouped heads"](), "bf16")
    assert any(operation.endswith("aten.cat") and dtype == "float32" for operation, dtype, *_ in profiled - ran)
    assert any(operation.endswith("aten.cat") and dtype == "bf16" for operation, dtype, *_ in ran - profiled)
