"""Memory that is no longer used is given back before the peak of a training is counted."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import torch
from torch import nn

from shardwise.run.training.process_memory import forget_peak


def test_engines_of_a_proof_are_collected_before_the_cache_of_a_gpu_is_emptied() -> None:
    gc.disable()
    try:
        alive = _module_that_refers_to_itself()
        seen: list[object] = []
        with (
            mock.patch.object(torch.cuda, "empty_cache", side_effect=lambda: seen.append(alive())),
            mock.patch.object(torch.cuda, "reset_peak_memory_stats", side_effect=seen.append),
        ):
            forget_peak(torch.device("cuda", 0))
    finally:
        gc.enable()
    assert seen == [None, torch.device("cuda", 0)]


def _module_that_refers_to_itself() -> weakref.ref[nn.Module]:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: print(module))
    return weakref.ref(module)
