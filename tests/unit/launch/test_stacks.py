"""Looks at the main thread from another one, which must not keep anything of it alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from shardwise.launch.stacks import Activity, look


class Large:
    """A tensor of a step, as a local variable of it."""


def during(seeing: Callable[[], Activity]) -> tuple[Activity, weakref.ref[Large]]:
    """Look from another thread while a function of this one has a large object."""
    large, found = Large(), list[Activity]()
    thread = threading.Thread(target=lambda: found.append(seeing()), daemon=True)
    thread.start()
    thread.join()
    return found[0], weakref.ref(large)


def test_a_look_keeps_no_tensor_of_the_step_alive() -> None:
    seen, large = during(look)
    assert large() is None
    assert not seen.stack


def test_a_stack_is_text_once_it_is_asked_for() -> None:
    seen, large = during(lambda: look(stack=True))
    assert large() is None
    assert "in during" in seen.stack
