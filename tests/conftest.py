from __future__ import annotations

import os

import pytest

# Threads that are done with their part would wait for the others in a loop, and keep cores from the tests beside them.
# Everything that tests start inherits it; torch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests predict nothing but where they say so: measuring the machine first would take half a minute.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reads it when torch is loaded
os.environ.setdefault("SHARDWISE_CLUSTER", "off")

SLOW = ("test_readme.py", "test_crosscheck.py", "test_dry_run.py", "test_local.py")
"""Files that begin first: one that begins last would be waited for by the other process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
